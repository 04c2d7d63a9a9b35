"""A model's chat template around what a message says: rendered once per layout (how texts and images alternate).

That is right for templates that write every text and image of a message once, as it is or trimmed. Others are refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables
from PIL import Image

from rethinker.config import ConfigError, DataConfig, one_line

# Stands for a text while the chat template is rendered: its number, and what a template that quotes or changes texts
# would not leave as it is, between private-use characters.
_TOUCHY = " \"'<&>\n  aA "
_SLOT = re.compile(f"\ue000(\\d+){re.escape(_TOUCHY)}\ue001")
# What a template leaves of white space before and after a text, and what it does to the text then.
_TRIMS: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
    (False, False): str.strip,
}
_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""How Qwen's chat templates tell of tools (Qwen2.5)."""
_TURN = "\ue000turn\ue001"
"""Stands for a turn of the policy."""
_FIX = (
    "a chat template must write every text and image of a message once and leave texts as they are; use the "
    "chat_template.jinja of the model that it was made from"
)


@dataclass(frozen=True)
class _Layout:
    """A chat template around some texts and images."""

    pieces: list[int | str]
    """The ids of what is fixed, and texts with slots."""
    trims: dict[int, Callable[[str], str]]
    """What the template does to each text, by the number of its slot."""


class ChatTemplate:
    """The chat template of one model, with what the settings choose of it.

    A layout, `kinds`, has a letter "t" for each text of a message and an "i" for each image, in their order.

    Args:
        processor: the model's Hugging Face processor.
        config: system message, `chat_template_kwargs`.
        text_ids: ids of ordinary text.
        tools: JSON schemas of what the policy may call, in OpenAI's form. A template that knows of tools tells of them,
            as the model was trained with; else the system message does, in the words of Qwen's.

    Raises:
        ConfigError: it does not leave texts as they are, or has no such choice or no system message.
    """

    def __init__(
        self,
        processor: Any,
        config: DataConfig,
        text_ids: Callable[[str], list[int]],
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.processor, self.config, self._text_ids = processor, config, text_ids
        self._tools: dict[str, Any] = {}
        self._told = bool(tools)
        if tools and "tools" in self._names():
            self._tools = {"tools": list(tools)}
        elif tools:
            told = _TOOLS.format("\n".join(map(json.dumps, tools)))
            self.config = replace(config, system=f"{config.system or 'You are a helpful assistant.'}\n\n{told}")
        tokens = processor.tokenizer.added_tokens_decoder.values()
        special = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self._layouts: dict[tuple[str, bool], _Layout] = {}
        self._check_choices()
        self._layout("t")

    def ids(self, kinds: str, texts: list[str], answer: bool = False) -> list[int]:
        """The prompt of a message, with one placeholder per image.

        Args:
            kinds: its layout.
            texts: its texts, and the system message ("" without one).
            answer: the message answers a turn of the policy instead: what follows the turn's text, beginning with the
                token that ends it, up to where the policy goes on.
        """
        layout = self._layout(kinds, answer)
        texts = [layout.trims.get(number, str)(text) for number, text in enumerate(texts)]
        ids: list[int] = []
        for piece in layout.pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._text_ids(_SLOT.sub(lambda slot: texts[int(slot[1])], piece))
        return ids

    def trims(self, kinds: str) -> bool:
        """Whether it takes white space from texts of such a message."""
        return any(trim is not str for trim in self._layout(kinds).trims.values())

    def _layout(self, kinds: str, answer: bool = False) -> _Layout:
        """The chat template around such a message."""
        if (kinds, answer) not in self._layouts:
            rendered = self._render(kinds, answer=answer)
            numbers = Counter(int(number) for number in _SLOT.findall(rendered))
            texts = kinds.count("t")
            if self.config.system is not None and not answer and numbers.pop(texts, 0) != 1:
                raise self._without_system("does not write a system message once")
            for times in (numbers[number] for number in range(texts)):
                if times != 1:
                    what = f"writes a text of a message {times} times" if times else "leaves out or changes a text"
                    raise self._unfit(what)
            if answer and not self.special.match(rendered):
                raise self._unfit("writes no special token behind a turn of the assistant")
            to_id, pieces = self.processor.tokenizer.convert_tokens_to_ids, []
            for n, text in enumerate(self.special.split(rendered)):  # every second one is a special token
                pieces += [to_id(text)] if n % 2 else [text] if _SLOT.search(text) else self._text_ids(text)
            if (shown := pieces.count(self.processor.image_token_id)) != kinds.count("i"):
                raise self._unfit(f"writes {shown} image placeholders for {kinds.count('i')} images")
            self._layouts[kinds, answer] = _Layout(pieces, self._trims(kinds, rendered, answer))
        return self._layouts[kinds, answer]

    def _trims(self, kinds: str, rendered: str, answer: bool) -> dict[int, Callable[[str], str]]:
        """How the template, once `rendered`, trims texts: seen in what it leaves of white space around them."""
        parts, kept = _SLOT.split(rendered), set()  # every second one is a slot's number
        for space in (" ", "\n", "\u2003"):
            pattern = "".join(
                f"({space})?{re.escape(_slot(part))}({space})?" if n % 2 else re.escape(part)
                for n, part in enumerate(parts)
            )
            found = re.fullmatch(pattern, self._render(kinds, space, answer))
            kept.add(found and tuple(group is not None for group in found.groups()))
        if len(kept) > 1 or None in kept:
            raise self._unfit("takes some white space from texts and leaves other")
        (sides,) = kept
        return {int(number): _TRIMS[sides[2 * n : 2 * n + 2]] for n, number in enumerate(parts[1::2])}

    def _render(self, kinds: str, space: str = "", answer: bool = False) -> str:
        """The chat template around slots, with white space around each; of an answer what follows the policy's turn."""
        slots = [f"{space}{_slot(number)}{space}" for number in range(kinds.count("t") + 1)]
        messages = self.messages(kinds, slots)
        try:
            if not answer:
                return self.apply(messages)
            # A turn of a word: the template must leave it alone, and end it.
            turns = [("user", "question"), ("assistant", _TURN)]
            before = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
            _, turn, rest = self.apply([*messages[:-1], *before, messages[-1]]).rpartition(_TURN)
            if turn:
                return rest
            raise ValueError("it leaves out the assistant's turns")
        except Exception as error:  # of a template's code, anything
            fault = self._unfit(f"cannot be rendered ({one_line(error)})")
            if self.config.system is not None:
                with suppress(Exception):
                    self.apply(messages[1:])
                    fault = self._without_system(f"takes no system message ({one_line(error)})")
            raise fault from error

    def apply(self, messages: list[dict[str, Any]]) -> str:
        """The processor's own text of a conversation."""
        choices = self.config.chat_template_kwargs | self._tools
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **choices)

    def _check_choices(self) -> None:
        """Check data.chat_template_kwargs: a template would ignore what it does not know."""
        if not (asked := self.config.chat_template_kwargs):
            return
        # What is not the user's: the conversation, functions, arguments of the call, and special tokens.
        own = {*signature(self.processor.apply_chat_template).parameters, "messages", "raise_exception", "strftime_now"}
        choices = sorted(name for name in self._names() - own if not name.endswith("_token"))
        for name in asked.keys() - set(choices):
            raise ConfigError(
                f"data.chat_template_kwargs: the model's chat template has no choice {name!r}; it has "
                f"{', '.join(choices) or 'none'}"
            )

    def _names(self) -> set[str]:
        """What the template reads."""
        try:
            # transformers' own tags, which mark what an assistant says.
            plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", str(self.processor.chat_template))
            environment = Environment(extensions=["jinja2.ext.loopcontrols"])
            return find_undeclared_variables(environment.parse(plain)) - environment.globals.keys()
        except TemplateError as error:
            raise self._unfit(f"cannot be rendered ({one_line(error)})") from error

    def messages(self, kinds: str, texts: list[str], images: Sequence[Image.Image] = ()) -> list[dict[str, Any]]:
        """A conversation of such a message, with its images or with their places alone."""
        spoken, shown = iter(texts), iter(images)
        content: list[dict[str, Any]] = []
        for kind in kinds:
            part = {"type": "image"} if kind == "i" else {"type": "text", "text": next(spoken)}
            content.append(part | {"image": next(shown)} if kind == "i" and images else part)
        messages = [{"role": "user", "content": content}]
        if self.config.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": texts[-1]}]})
        return messages

    def _without_system(self, what: str) -> ConfigError:
        if self._told and not self._tools:
            return ConfigError(
                f"environment.describe=true: the model's chat template knows of no tools and {what}; set it to false, "
                "and describe the tools in data.prompt"
            )
        return ConfigError(
            f"data.system={self.config.system!r}: the model's chat template {what}; set data.system to null, and put "
            "the text into data.prompt"
        )

    def _unfit(self, what: str) -> ConfigError:
        asked = self.config.chat_template_kwargs
        given = f" with data.chat_template_kwargs={asked}" if asked else ""
        return ConfigError(f"policy.model: its chat template{given} {what}; {_FIX}")


def _slot(number: int | str) -> str:
    """What stands for a text; `_SLOT` finds it."""
    return f"\ue000{number}{_TOUCHY}\ue001"
