"""Queries as the model reads them: chat template, token ids, image placeholders, pixels.

Equal to the Hugging Face processor's own output, but for one thing: text that spells a special token stays text. A
question that contains `<|image_pad|>` would otherwise ask for the features of an image that does not exist.

A query costs one tokenizer call; the first prompts of a layout (how texts and images alternate) are compared with what
the processor itself makes of them.
"""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from cachetools import LRUCache, cached
from PIL import Image

from rethinker.config import ConfigError, DataConfig, one_line
from rethinker.data.chat_template import ChatTemplate
from rethinker.data.datasets import BadRowError, check_bad_rows
from rethinker.data.images import UnreadableImageError, check_image, image_key, image_size, open_image
from rethinker.data.query_stream import QueryStream
from rethinker.families import family_of_processor, limit_pixels
from rethinker.samples import IMAGE_MARK, Prompt, Query

log = logging.getLogger(__name__)

# Host memory for decoded images, for pixel tensors and for token ids; what does not fit is made again.
IMAGE_CACHE_BYTES = 128 * 2**20
PIXEL_CACHE_BYTES = 256 * 2**20
PROMPT_CACHE_TOKENS = 2 * 10**6
SIZES = 10_000  # of images, with those in which the model sees them

COMPARED = 2
"""Prompts of each layout that are compared with the processor's own."""
FIRST = 16
"""Queries that are looked through for these before a model is loaded."""


class PromptEncoder:
    """Encodes queries for one model.

    Args:
        processor: the model's Hugging Face processor; its pixel limits are set to the config's.
        config: template, system message, limits.
        tools: what the policy may call; see `ChatTemplate`.

    Raises:
        ConfigError: a processor of no supported family, a tokenizer whose special tokens cannot be kept out of
            ordinary text, or a chat template that `ChatTemplate` refuses.
    """

    def __init__(self, processor: Any, config: DataConfig, tools: Sequence[dict[str, Any]] = ()) -> None:
        self.processor, self.config = processor, config
        self.tokenizer = processor.tokenizer
        self.family = family_of_processor(processor)
        # In place, so that a saved checkpoint carries the limits it was trained with.
        limit_pixels(processor, self.family, config.min_pixels, config.max_pixels)
        # Rollouts beside the training decode in their thread, and two in one fast tokenizer fail: "Already borrowed".
        self._one_at_a_time = Lock()
        self.dropped: Counter[str] = Counter()
        self._image_id = processor.image_token_id
        tokens = self.tokenizer.added_tokens_decoder
        self._compared: Counter[str] = Counter()
        self._prefix, self._suffix = config.prompt.split("{question}")
        # Conversations ask for images from threads of their own.
        images = LRUCache(IMAGE_CACHE_BYTES, lambda image: 3 * image.width * image.height)
        named = {"key": lambda reference, query_id: image_key(reference), "lock": Lock()}
        self._image = cached(images, **named)(self._open_image)
        pixels = LRUCache(PIXEL_CACHE_BYTES, lambda inputs: inputs["pixel_values"].nbytes)
        self._pixels = cached(pixels, key=_shown, lock=Lock())(self._process)
        ids = LRUCache(PROMPT_CACHE_TOKENS, lambda pair: len(pair[0]) + len(pair[1]))
        asked = {"key": lambda query: (query.question, _shown(query)), "lock": Lock()}
        self._token_ids = cached(ids, **asked)(self._tokenize)
        self._shown_size = cached(LRUCache(SIZES), lock=Lock())(self._resized)
        self._misfits: set[str] = set()
        self._whole: set[Hashable] = set()  # images that have been read to their end
        # Characters that no prompt within the limit can have: a longer text need not be tokenised to be left out. A
        # token spells at most its own bytes, and Unicode normalisation makes at most four characters into one.
        longest = max(map(len, self.tokenizer.get_vocab()))
        self._most_characters = 4 * longest * config.max_prompt_tokens
        for i, token in tokens.items():
            if token.special and i in self._text_ids(token.content):
                raise ConfigError(
                    f"policy.model: its tokenizer reads {token.content!r} within ordinary text as a special token"
                )
        self._tools = tools
        self._template = ChatTemplate(processor, config, self._text_ids, tools)

    def encode(self, query: Query) -> Prompt:
        """The query's prompt, with its images decoded.

        Raises:
            ConfigError: an image that cannot be read, `<image>` marks that do not match the images, or a chat template
                that changes what a message says.
        """
        compact, expanded = self._token_ids(query)
        prompt = Prompt(query.id, list(expanded), list(compact), [self._image(i, query.id) for i in query.images])
        self._compare(query, prompt)
        return prompt

    def observation(self, text: str, images: Sequence[Any], query_id: str) -> Prompt:
        """What the policy reads between two of its turns: a message, with `<image>` where its images stand.

        Its ids begin with the token that ends the policy's turn and end where the next one begins.

        Args:
            images: references, as of a query; as many as marks.

        Raises:
            ConfigError: an image that cannot be read or shown, or a chat template without such messages.
        """
        texts = text.split(IMAGE_MARK)
        kinds = "i".join("t" if part else "" for part in texts)
        compact = self._template.ids(kinds, [*filter(None, texts), ""], answer=True)
        expanded = self._expand(compact, images, query_id)
        return Prompt(query_id, expanded, compact, [self._image(i, query_id) for i in images])

    def check_answers(self) -> None:
        """Render the chat template around what an environment may answer.

        Raises:
            ConfigError: it has no such messages.
        """
        for kinds in ("t", "i", "tit"):
            self._template.ids(kinds, [*("so" for kind in kinds if kind == "t"), ""], answer=True)

    def continuation(self, text: str) -> list[int]:
        """The ids of text that is put into the policy's mouth; what spells a special token is ordinary text."""
        return self._text_ids(text)

    def shortened(self, text: str, longest: int) -> str:
        """A text of at most about so many tokens: a longer one loses the middle of its parts between images."""
        parts = text.split(IMAGE_MARK)
        return IMAGE_MARK.join(self._cut(part, max(2, longest // len(parts))) for part in parts)

    def _cut(self, text: str, longest: int) -> str:
        ids = self._text_ids(text)
        if len(ids) <= longest:
            return text
        return f"{self.decode(ids[: longest // 2])} [...] {self.decode(ids[longest // 2 - longest :])}"

    def shown_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in which the model sees an image of that size."""
        return self._shown_size(width, height)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        return self.family.shown(self.processor.image_processor, height, width)[::-1]

    def pixels(self, query: Query) -> dict[str, torch.Tensor]:
        """For the vision tower: the family's image_inputs of all images of the query, fp32; empty without images."""
        return self._pixels(query) if query.images else {}

    def _process(self, query: Query) -> dict[str, torch.Tensor]:
        images = [self._image(image, query.id) for image in query.images]
        arguments = self.family.image_arguments(self.processor)
        return self.family.image_inputs(self.processor.image_processor(images=images, return_tensors="pt", **arguments))

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        """The text of a response, spaces as they are, with or without special tokens."""
        with self._one_at_a_time:
            ids = list(token_ids)
            return self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def png_images(self, query: Query) -> list[bytes]:
        """The query's images as the model sees them, as PNG files in bytes; any thread may ask.

        Raises:
            UnreadableImageError: an image that cannot be read.
        """
        files = []
        for reference in query.images:
            with io.BytesIO() as file:
                self._open_image(reference, query.id).save(file, "PNG", compress_level=1)
                files.append(file.getvalue())
        return files

    def misfit(self, query: Query) -> str | None:
        """Why the query is left out, or None if it fits: `data.max_images`, `data.max_prompt_tokens`, `image shape`, or
        `unreadable image` (each is read to its end once); prompts are never truncated."""
        fault = self._fault(query)
        return fault and fault.reason

    def _fault(self, query: Query) -> BadRowError | None:
        limits = self.config
        if len(query.images) > limits.max_images:
            return BadRowError("data.max_images", f"data.max_images={limits.max_images}")
        told = ", of which environment.describe=true takes some to tell of the tools" if self._tools else ""
        too_long = BadRowError("data.max_prompt_tokens", f"data.max_prompt_tokens={limits.max_prompt_tokens}{told}")
        if len(query.question) > self._most_characters:
            return too_long
        try:
            if len(self._token_ids(query)[1]) > limits.max_prompt_tokens:
                return too_long
            for reference in query.images:
                if (key := image_key(reference)) not in self._whole:
                    check_image(reference, query.id, limits.max_image_pixels)
                    self._whole.add(key)
        except BadRowError as error:
            return error
        except UnreadableImageError as error:
            return BadRowError("unreadable image", str(error))
        return None

    def fitting(self, stream: QueryStream) -> Query:
        """The stream's next query that fits; the others are passed over and counted, each once, in `dropped`.

        What fits is a matter of the data alone, so that all ranks come to the same queries without asking each other.

        Raises:
            ConfigError: no query of a whole epoch fits, or the images of more than `data.max_bad_rows` of the queries
                cannot be read.
        """
        fault = None
        for _ in range(len(stream)):
            (query,) = stream.next(1)
            if query.id not in self._misfits:
                fault = self.leave_out(query, self.dropped, len(stream))
                if fault is None:
                    return query
                self._misfits.add(query.id)
                stream.leave_out(query)
        raise _none_fits(fault, self.dropped)

    def leave_out(self, query: Query, dropped: Counter[str], of: int) -> BadRowError | None:
        """None for a query that fits; otherwise why it does not, counted in `dropped`; the first of a reason is logged.
        Raises as `fitting` does."""
        fault = self._fault(query)
        if fault is None:
            return None
        dropped[fault.reason] += 1
        if fault.reason == "unreadable image":
            check_bad_rows(fault, dropped[fault.reason], of, self.config.max_bad_rows)
        if dropped[fault.reason] == 1 and os.environ.get("RANK", "0") == "0":
            log.warning("left out query %s: %s; further ones are only counted", query.id, fault)
        return fault

    def state_dict(self) -> dict[str, Any]:
        """What has been left out so far: counts by reason, and the queries; plain JSON."""
        return {"dropped": dict(self.dropped), "misfits": sorted(self._misfits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a `state_dict`: what it left out stays left out and is not counted again."""
        self.dropped, self._misfits = Counter(state["dropped"]), set(state["misfits"])

    def check(self, queries: Iterable[Query]) -> None:
        """Read some queries, as a run's first ones: a chat template's faults are to come before a model is loaded.

        Raises:
            ConfigError: as `encode`.
        """
        for query in queries:
            if self.misfit(query) is None and self._compared[self._parts(query)[0]] < COMPARED:
                self.encode(query)

    def _compare(self, query: Query, made: Prompt) -> None:
        """Compare one of the first prompts of a layout with what the processor makes of the same message."""
        kinds, texts = self._parts(query)
        # A template that trims a message as a whole goes on into the next text where one is blank.
        doubtful = self._template.trims(kinds) and not all(map(str.strip, texts[:-1]))
        if (self._compared[kinds] >= COMPARED and not doubtful) or any(map(self._template.special.search, texts)):
            return
        self._compared[kinds] += 1
        messages = self._template.messages(kinds, texts, made.images)
        try:
            with self._one_at_a_time:
                # As its apply_chat_template with tokenize=True, but with all images in one list, as vLLM gives them:
                # of several in a list for each prompt LLaVA-OneVision's would make one tile each.
                text = self._template.apply(messages)
                bos = self.tokenizer.bos_token
                whole = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
                own = self.processor(text=[text], images=made.images or None, **whole)
        except Exception as error:  # of a template's code, anything
            raise ConfigError(f"policy.model: its processor cannot read query {query.id}: {one_line(error)}") from error
        theirs, ours = list(own["input_ids"][0]), made.token_ids
        if theirs != ours:
            place = next((n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
            with self._one_at_a_time:
                there, here = (self.tokenizer.decode(ids[place:][:8]) for ids in (theirs, ours))
            raise ConfigError(
                f"policy.model: its processor reads query {query.id} as {len(theirs)} tokens, and its chat template "
                f"with the query's texts and images put in is {len(ours)}: {there!r} there is {here!r} here; the "
                "template must not depend on what a message says, and the tokenizer not add tokens to it"
            )

    def _tokenize(self, query: Query) -> tuple[list[int], list[int]]:
        """(compact, expanded) ids, as `_token_ids` returns them; not to be changed by the caller."""
        kinds, texts = self._parts(query)
        compact = self._template.ids(kinds, texts)
        return compact, self._expand(compact, query.images, query.id)

    def _expand(self, compact: list[int], images: Sequence[Any], query_id: str) -> list[int]:
        """The ids with each image's own in place of its placeholder."""
        shown = iter([self._image_ids(image, query_id) for image in images])
        expanded: list[int] = []
        for i in compact:
            expanded += next(shown) if i == self._image_id else (i,)
        return self.family.joined(self.processor, expanded) if images else expanded

    def _parts(self, query: Query) -> tuple[str, list[str]]:
        """How texts ("t") and images ("i") alternate in the query's message, and the texts, the system's last."""
        marks = query.question.count(IMAGE_MARK)
        if marks not in (0, len(query.images)):
            raise ConfigError(
                f"query {query.id}: {marks} {IMAGE_MARK} marks in the question but {len(query.images)} images; "
                "mark every image once, or none"
            )
        parts = query.question.split(IMAGE_MARK)
        parts[0] = self._prefix + parts[0]
        parts[-1] += self._suffix
        if len(parts) <= len(query.images):  # without marks the images come first
            parts = [""] * len(query.images) + parts
        kinds = "".join(("i" if n else "") + ("t" if text else "") for n, text in enumerate(parts))
        return kinds, [*filter(None, parts), self._template.config.system or ""]

    def _text_ids(self, text: str) -> list[int]:
        """Ids of ordinary text; what spells a special token is split like any other characters."""
        with self._one_at_a_time:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _image_ids(self, reference: Any, query_id: str) -> list[int]:
        height, width = image_size(reference, query_id, self.config.max_image_pixels)
        try:
            with self._one_at_a_time:
                return self.family.image_ids(self.processor, height, width)
        except ValueError as error:
            raise BadRowError("image shape", f"query {query_id}: {error}") from error

    def open_image(self, reference: Any, query_id: str) -> Image.Image:
        """An image in full, as its file has it."""
        return open_image(reference, query_id, self.config.max_image_pixels)

    def _open_image(self, reference: Any, query_id: str) -> Image.Image:
        """Above `max_pixels` in the processor's size if possible, so that no photo fills the memory."""
        return self.family.reduced(self.processor.image_processor, self.open_image(reference, query_id))


def _shown(query: Query) -> tuple[Hashable, ...]:
    return tuple(map(image_key, query.images))


def select_fitting(queries: Sequence[Query], encoder: PromptEncoder) -> tuple[list[Query], Counter[str]]:
    """The queries whose prompts are within the limits, and how many were left out for which reason.

    Raises:
        ConfigError: none fits, or the images of more than `data.max_bad_rows` of them cannot be read.
    """
    dropped: Counter[str] = Counter()
    faults = [encoder.leave_out(query, dropped, len(queries)) for query in queries]
    kept = [query for query, fault in zip(queries, faults, strict=True) if fault is None]
    if dropped and not kept:
        raise _none_fits(faults[-1], dropped)
    return kept, dropped


def _none_fits(fault: BadRowError | None, dropped: Counter[str]) -> ConfigError:
    """The error for a data set of which no query fits, naming what is wrong with one of them."""
    return ConfigError(
        f"{fault or 'data.train'}: no query fits (left out: {dict(dropped)}); raise the limit or use other data"
    )
