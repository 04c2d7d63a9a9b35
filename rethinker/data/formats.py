r"""Data as other trainers write it: which of their columns hold what, and what stands in these.

`data.format` names the trainer, or `auto` finds it by the columns. Chats and odd answers are read without it, too, as
soon as `data.fields` names their columns: nothing else can be meant by them. What a text may mean (`<answer>`, `####`)
and how options are written is looked at with `data.format` alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from typing import Any

from rethinker.rewards.answers import extract_boxed
from rethinker.samples import IMAGE_MARK

VIDEO_MARK = "<video>"

# By format and noun: the columns that may hold it, the first that is there. A chat as answer is its last reply.
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "verl": {"question": ("prompt",), "answer": ("reward_model.ground_truth",), "images": ("images", "image")},
    "swift": {
        "question": ("messages", "conversations", "query"),
        "answer": ("solution", "answer", "response", "messages", "conversations"),
        "images": ("images", "image"),
    },
    "r1v": {
        "question": ("problem", "conversations"),
        "answer": ("answer", "solution", "conversations"),
        "images": ("image", "images"),
    },
    "trl": {
        "question": ("prompt", "problem"),
        "answer": ("answer", "ground_truth", "solution", "completion"),
        "images": ("images", "image"),
    },
}
# What `auto` tries first: the columns that data.fields names by default.
_PLAIN = {"question": ("question",), "answer": ("answer",), "images": ("images", "image")}

_ROLES = {"human": "user", "gpt": "assistant"}
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BEHIND_MARKS = re.compile(r"(?:^|\s)####[ \t]*(\S[^\n]*)\Z")  # GSM8K's last line
_OPEN_BOX = re.compile(r"\\boxed\s*\{")
# A backslash that JSON or YAML took for an escape: \b of \boxed, \f of \frac, \t of \text, \r of \right, \n of \nabla.
_ESCAPED = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\t(?=ext|frac|imes|heta)|\r(?=ight)|\n(?=abla)")
_BRACKETED = re.compile(r"[(\[{].*[)\]}]|(?<=\d),(?=\d{3}(?!\d))", re.DOTALL)
_SEPARATOR = re.compile(r"[,;]|\s(?:and|or)\s")
# How base64 of PNG, JPEG, GIF, WebP, BMP, TIFF and AVIF begins.
_IMAGE_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK", "AAAA")
_LETTERS = list("ABCDEFGHIJ")  # of columns that hold an option each
_SHORTEST_IMAGE = 48  # characters of base64; a path may begin like one


class BadValueError(ValueError):
    """A value that cannot be used: the reason it is counted under, and what the row has."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def format_of(name: str | None, columns: Collection[str], given: Collection[str]) -> str | None:
    """The format to read a data set by: the one that `data.format` names; of `auto` the first that fits, or "" for
    columns called `question` and `answer`; None where no format is to be used, or none fits.

    Args:
        name: `data.format`.
        columns: of the data set.
        given: nouns whose column `data.fields` names.
    """
    if name != "auto":
        return name
    for known, nouns in {"": _PLAIN, **FORMATS}.items():
        if all(noun in given or _first(nouns[noun], columns) for noun in ("question", "answer")):
            return known
    return None


def format_columns(name: str | None, columns: Collection[str]) -> dict[str, str]:
    """Noun to column (`reward_model.ground_truth` is an entry of one) as a format has them; {} of None.

    A format without a column for the question or the answer gives the one that it asks for first.
    """
    if name is None:
        return {}
    nouns = FORMATS[name] if name else _PLAIN
    found = {noun: _first(paths, columns) for noun, paths in nouns.items()}
    return {noun: path or nouns[noun][0] for noun, path in found.items() if path or noun != "images"}


def _first(paths: Iterable[str], columns: Collection[str]) -> str | None:
    return next((path for path in paths if path.partition(".")[0] in columns), None)


def cell(row: Mapping[str, Any], path: str) -> Any:
    """What a column holds, or an entry within one: `reward_model.ground_truth`. None where there is no such thing."""
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def question_of(value: Any, column: str, spelled: bool = False) -> tuple[str, list[Any], str | None]:
    """A question's text with a mark for every image, the images that a chat holds itself, and its system message.

    Args:
        value: a text, or a chat: messages of `role` and `content`, or of `from` and `value`, whose content is a text or
            a list of texts and images. The question is its one message of the user; a reply behind it is left out.
        column: that it stands in, for messages.
        spelled: whether to look for a chat written as JSON.

    Raises:
        BadValueError: nothing of the kind, or a chat of several turns.
    """
    if spelled and isinstance(value, str) and _turns(chat := _read_json(value)):
        value = chat
    if isinstance(value, str):
        return value, [], None
    turns = _turns(value)
    system = [content for role, content in turns if role == "system"]
    asked = [(role, content) for role, content in turns if role != "system"]
    if asked and asked[-1][0] == "assistant":
        asked.pop()
    if not asked:
        raise BadValueError("no question", f"has no question text in column {column!r}")
    if [role for role, _ in asked] != ["user"]:
        roles = ", ".join(role[:20] for role, _ in asked[:8])
        raise BadValueError(
            "several turns",
            f"has a chat of {roles!r} in column {column!r}; a question is one message of the user, before it at most a "
            "system message, behind it at most a reply",
        )
    return *_content(asked[0][1]), _content(system[0])[0] if system else None


def check_shown(row: Mapping[str, Any], question: str, name: str | None) -> None:
    """Check that all of a question is shown to the model, as far as a row says.

    Args:
        row: of the data set.
        question: its text.
        name: `data.format`.

    Raises:
        BadValueError: a video; earlier turns, which ms-swift has in a column.
    """
    if VIDEO_MARK in question or row.get("videos") or row.get("video"):
        raise BadValueError("a video", "has a video, and only images are shown; leave it out")
    if name == "swift" and row.get("history"):
        raise BadValueError("several turns", "has earlier turns in column 'history'; a question is one message")


def _turns(value: Any) -> list[tuple[str, Any]]:
    """The messages of a chat, each its role and its content; [] of anything else."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        return []
    role, content = ("from", "value") if value and "from" in value[0] else ("role", "content")
    if not all(isinstance(message.get(role), str) for message in value):
        return []
    return [(_ROLES.get(message[role], message[role]), message.get(content)) for message in value]


def _content(content: Any) -> tuple[str, list[Any]]:
    """A message's text with its images' marks, and those images that stand in it."""
    if isinstance(content, str):
        return content, []
    text, images = "", []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        given = part if isinstance(part, Mapping) else {"text": part}
        kind = given.get("type") or ("text" if isinstance(given.get("text"), str) else "image")
        if kind == "text" and isinstance(given.get("text"), str):
            text += given["text"]
        elif kind in ("image", "image_url") and (given.get("type") or image_in(given) is not None):
            text += IMAGE_MARK
            images += [given] if image_in(given) is not None else []  # else it stands in the column of images
        else:
            what = repr(given["type"])[:40] if given.get("type") else kind_of(part)
            raise BadValueError("no question", f"has {what} in its chat, not text or image")
    return text, images


def answer_of(value: Any, column: str, undress: bool) -> str:
    """The answer's text, one that a response can give.

    Args:
        value: a text or a number; a list of these, all of which are wanted in any order; a chat.
        column: that it stands in, for messages.
        undress: whether to look for `<answer>`, `####` and a list written as JSON.

    Raises:
        BadValueError: anything else; a text that is empty, or whose box is, or is never closed; control characters.
    """
    text = _text_of(value, column, undress)
    if not text.strip():
        raise BadValueError("empty answer", f"has an empty answer in column {column!r}")
    if _OPEN_BOX.search(text):
        inner = extract_boxed(text)
        if inner is None or not inner.strip():
            kind = "unclosed" if inner is None else "empty"
            shown = text if len(text) <= 80 else f"...{text[-80:]}"
            raise BadValueError(f"{kind} box", f"has an {kind} box as answer in column {column!r}: {shown!r}")
    if (found := _ESCAPED.search(text)) is not None:
        start = max(0, found.start() - 30)
        raise BadValueError(
            "control character",
            f"has a control character in its answer in column {column!r}: {text[start : found.start() + 30]!r}; JSON "
            r"and YAML read \b, \f, \n, \r and \t as characters: double the backslash, as in \\boxed and \\frac",
        )
    return text


def _text_of(value: Any, column: str, undress: bool) -> str:
    if turns := _turns(value):
        role, content = turns[-1]
        if role != "assistant":
            raise BadValueError("no answer", f"has no reply at the end of the chat in column {column!r}")
        value = _content(content)[0]
    if isinstance(value, str):
        return _undressed(value, column) if undress else value
    if isinstance(value, (list, tuple)):
        return _listed(value, column, undress)
    if isinstance(value, (int, float, Decimal)) and _finite(value):
        return f"{value:f}" if isinstance(value, Decimal) else str(value)
    fix = "an answer is a text or a number"
    if isinstance(value, Mapping) and value:
        fix = f"name the entry that is the answer, as data.fields.answer={column}.{next(iter(value))}"
    elif hasattr(value, "isoformat") or hasattr(value, "total_seconds"):
        fix = f"write it as the text that a response is to give, such as {str(value)!r}"
    raise BadValueError("no answer", f"has {kind_of(value)} as answer in column {column!r}; {fix}")


def dressed(text: str) -> bool:
    """Whether a text holds its answer between `<answer>` and `</answer>`, or behind the `####` of its last line."""
    return bool(_TAGGED.search(text) or _BEHIND_MARKS.search(text.rstrip()))


def _undressed(text: str, column: str) -> str:
    if tags := _TAGGED.findall(text):
        return tags[-1].strip()
    if found := _BEHIND_MARKS.search(text.rstrip()):
        return found[1]
    spelled = _read_json(text)
    # Of texts alone: [3, 4] is a list, or an interval, as it stands.
    listed = isinstance(spelled, list) and spelled and all(isinstance(item, str) for item in spelled)
    return _listed(spelled, column, False) if listed else text


def _listed(items: Collection[Any], column: str, undress: bool) -> str:
    """`3, 4`, which the reward takes in any order; of one item that item."""
    if any(isinstance(item, (list, tuple, Mapping)) for item in items):
        fix = "a list of texts or numbers is an answer"
        raise BadValueError("no answer", f"has a list of lists or dicts as answer in column {column!r}; {fix}")
    texts = [_text_of(item, column, undress).strip() for item in items if item is not None]
    split = next((text for text in texts if _SEPARATOR.search(_BRACKETED.sub("", text))), None)
    if len(texts) > 1 and split is not None:
        raise BadValueError(
            "no answer",
            f"has a list with {split[:80]!r} as answer in column {column!r}; an item with a comma, a semicolon, "
            "`and` or `or` cannot be told from two: write the answer as one text",
        )
    return ", ".join(texts)


def with_choices(metadata: dict[str, Any], answer: str, index: bool = False) -> tuple[dict[str, Any], str]:
    """The metadata with `choices` as a list of texts or a mapping from letters to texts, and the answer.

    Options may be a list, a mapping, texts with labels (`{"text": [...], "label": [...]}`, or a list of such), any of
    these as JSON, or columns A, B, C, ... An answer that is a label but no letter becomes the letter of its place.

    Args:
        metadata: of the row.
        answer: its text.
        index: whether it is a whole number, which may be an option's place.

    Raises:
        BadValueError: such a number, from 0 to that of the options.
    """
    given = metadata.get("choices") or metadata.get("options")
    given = given if given is not None else {letter: metadata.get(letter) for letter in _LETTERS}
    given = _read_json(given) if isinstance(given, str) else given
    if isinstance(given, (list, tuple)) and all(isinstance(item, Mapping) and "text" in item for item in given):
        given = {key: [item.get(key) for item in given] for key in ("text", "label")}
    if isinstance(given, Mapping) and given and all(str(key).isdigit() for key in given):
        given = {"text": list(given.values()), "label": list(given)}
    if isinstance(given, Mapping) and isinstance(given.get("text"), list) and isinstance(given.get("label"), list):
        texts, labels = given["text"], [str(label) for label in given["label"]]
        lettered = all(len(label) == 1 and label.isalpha() for label in labels)
        given = dict(zip(labels, texts, strict=False)) if lettered else texts
        if not lettered and answer.strip() in labels[:26]:
            answer, index = chr(ord("A") + labels.index(answer.strip())), False
    if isinstance(given, Mapping):
        shown = ((letter, text) for letter, text in given.items() if isinstance(text, (str, int, float)))
        given = {letter: text for letter, text in shown if text != "" and _finite(text)}
        given = list(given.values()) if list(given) == _LETTERS[: len(given)] else given
    usable = isinstance(given, (list, tuple, Mapping)) and len(given) > 1
    if usable and index and 0 <= int(answer) <= len(given):
        raise BadValueError(
            "option number",
            f"has the number {answer} as answer beside {len(given)} options: the place of one, counted from 0 or from "
            "1, or its text; write the option's letter, or its text as text",
        )
    return {**metadata, "choices": given} if usable else metadata, answer


def image_in(value: Mapping[str, Any]) -> Any:
    """What `{"bytes", "path"}`, `{"image"}`, `{"url"}` or `{"image_url": {"url"}}` holds; None for nothing."""
    content = value.get("bytes")
    if isinstance(content, str):
        content = _decoded(content)
    if content and isinstance(content, (bytes, bytearray)):
        return content
    return next((value[key] for key in ("path", "image", "image_url", "url") if value.get(key)), None)


def image_text(text: str) -> Any:
    """The image of a data URI or of base64, or the images that a text spells in JSON; None of other texts.

    Raises:
        BadValueError: an address, or a data URI that is not base64.
    """
    if text[:5].lower() == "data:":
        head, _, body = text.partition(",")
        content = _decoded(body, any_start=True) if head.endswith(";base64") else None
        if not content:
            raise BadValueError("no image", f"has a data URI that is no base64: {text[:40]!r}")
        return content
    if re.match(r"(?!file:)[a-zA-Z][a-zA-Z0-9+.-]+://", text):
        raise BadValueError(
            "image URL",
            f"has the address {text[:200]!r} as an image, and nothing is downloaded; fetch the images first, and name "
            "their files, or embed their bytes",
        )
    return _decoded(text) or _read_json(text)


def _decoded(text: str, any_start: bool = False) -> bytes | None:
    """The bytes of base64, with or without line breaks; None of a text that is none, or no image's."""
    if not any_start and (len(text) < _SHORTEST_IMAGE or not text.startswith(_IMAGE_STARTS)):
        return None
    text = "".join(text.split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        return None


def _read_json(text: str) -> Any:
    """The list or mapping that a text spells; None of any other text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _finite(value: Any) -> bool:
    """Whether a value is no NaN and no infinity."""
    return value.is_finite() if isinstance(value, Decimal) else not isinstance(value, float) or math.isfinite(value)


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    if not _finite(value):
        return str(value)
    return "nothing" if value is None else f"a {type(value).__name__}"
