"""Queries as the model reads them: chat template, token ids, image placeholders, pixels.

Equal to the Hugging Face processor's own output, but for one thing: text that spells a special token stays text. A
question that contains `<|image_pad|>` would otherwise ask for the features of an image that does not exist.

The chat template is rendered once per layout (how texts and images alternate); a query then costs one tokenizer call.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import IMAGE_MARK
from rethinker.data.faults import check_bad_rows
from rethinker.data.images import UNREADABLE, UnreadableImageError, check_image, image_key, image_size, open_image
from rethinker.data.query_stream import QueryStream
from rethinker.families import family_of_processor, limit_pixels
from rethinker.samples import Prompt, Query

log = logging.getLogger(__name__)

# Host memory for decoded images and for pixel tensors; what does not fit is made again.
IMAGE_CACHE_BYTES = 128 * 2**20
PIXEL_CACHE_BYTES = 256 * 2**20
PROMPT_CACHE_TOKENS = 2 * 10**6

# Stands for text number i while the chat template is rendered: private-use characters that no template touches.
_SLOT = re.compile("\ue000(\\d+)\ue001")


class PromptEncoder:
    """Encodes queries for one model.

    Args:
        processor: the model's Hugging Face processor; its pixel limits are set to the config's.
        config: template, system message, limits.

    Raises:
        ConfigError: a template without `{question}`, pixel limits that contradict each other, a processor of no
            supported family, or a tokenizer whose special tokens cannot be kept out of ordinary text.
    """

    def __init__(self, processor: Any, config: DataConfig) -> None:
        if config.prompt.count("{question}") != 1:
            raise ConfigError(f"data.prompt={config.prompt!r} must hold {{question}} exactly once")
        if config.min_pixels > config.max_pixels:
            raise ConfigError(
                f"data.min_pixels={config.min_pixels} exceeds data.max_pixels ({config.max_pixels}); lower it to that"
            )
        self.processor, self.config = processor, config
        self.tokenizer = processor.tokenizer
        self.family = family_of_processor(processor)
        # In place, so that a saved checkpoint carries the limits it was trained with.
        limit_pixels(processor, self.family, config.min_pixels, config.max_pixels)
        # Rollouts beside the training decode in their thread, and two in one fast tokenizer fail: "Already borrowed".
        self._one_at_a_time = threading.Lock()
        self.dropped: Counter[str] = Counter()
        self._image_id = processor.image_token_id
        self._special = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        added = sorted((token.content for token in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, added)) + ")")
        self._layouts: dict[str, list[int | list[str | int]]] = {}
        self._prefix, self._suffix = config.prompt.split("{question}")
        self._images = _BoundedCache(IMAGE_CACHE_BYTES, lambda image: 3 * image.width * image.height)
        self._pixels = _BoundedCache(PIXEL_CACHE_BYTES, lambda inputs: inputs["pixel_values"].nbytes)
        self._ids = _BoundedCache(PROMPT_CACHE_TOKENS, lambda pair: len(pair[0]) + len(pair[1]))
        self._misfits: set[str] = set()
        self._whole: set[Hashable] = set()  # images that have been read to their end
        # Characters that no prompt within the limit can have: a longer text need not be tokenised to be left out. A
        # token spells at most its own bytes, and Unicode normalisation makes at most four characters into one.
        longest = max(map(len, self.tokenizer.get_vocab()))
        self._most_characters = 4 * longest * config.max_prompt_tokens
        for token, i in self._special.items():
            if i in self._text_ids(token):
                raise ConfigError(
                    f"policy.model: its tokenizer reads {token!r} within ordinary text as a special token"
                )

    def encode(self, query: Query) -> Prompt:
        """The query's prompt, with its images decoded.

        Raises:
            ConfigError: an image that cannot be read, or `<image>` marks that do not match the images.
        """
        compact, expanded = self._token_ids(query)
        return Prompt(query.id, list(expanded), list(compact), [self._image(i, query.id) for i in query.images])

    def pixels(self, query: Query) -> dict[str, torch.Tensor]:
        """For the vision tower: the family's IMAGE_INPUTS of all images of the query, fp32; empty without images."""
        if not query.images:
            return {}
        key = tuple(image_key(image) for image in query.images)

        def process() -> dict[str, torch.Tensor]:
            images = [self._image(image, query.id) for image in query.images]
            features = self.processor.image_processor(images=images, return_tensors="pt")
            return {name: features[name] for name in self.family.IMAGE_INPUTS}

        return self._pixels.get(key, process)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a response, spaces as they are, without special tokens."""
        with self._one_at_a_time:
            return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def misfit(self, query: Query) -> str | None:
        """Why the query is left out, or None if it fits: `data.max_images`, `data.max_prompt_tokens`, `image shape`, or
        `unreadable image`; prompts are never truncated.

        An image is read to its end the first time that it is asked for, and not kept: 0.1 ms for 64 x 64 pixels; for
        1024 x 1024 it is 2 ms as JPEG and 25 ms as PNG or WebP (one core of a 2-core Xeon VM).
        """
        return self._fault(query)[0]

    def _fault(self, query: Query) -> tuple[str | None, UnreadableImageError | None]:
        """The reason of `misfit`, and what is wrong with the image if it is that."""
        if len(query.images) > self.config.max_images:
            return "data.max_images", None
        if len(query.question) > self._most_characters:
            return "data.max_prompt_tokens", None
        try:
            _, expanded = self._token_ids(query)
            if len(expanded) > self.config.max_prompt_tokens:
                return "data.max_prompt_tokens", None
            for reference in query.images:
                if (key := image_key(reference)) not in self._whole:
                    check_image(reference, query.id, self.config.max_image_pixels)
                    self._whole.add(key)
        except _ImageShapeError:
            return "image shape", None
        except UnreadableImageError as error:
            return UNREADABLE, error
        return None, None

    def fitting(self, stream: QueryStream) -> Query:
        """The stream's next query that fits; the others are passed over and counted, each once, in `dropped`.

        What fits is a matter of the data alone, so that all ranks come to the same queries without asking each other.

        Raises:
            ConfigError: no query of a whole epoch fits, or the images of more than `data.max_bad_rows` of the queries
                cannot be read.
        """
        for _ in range(len(stream)):
            (query,) = stream.next(1)
            if query.id not in self._misfits:
                if self.fits_or_count(query, self.dropped, len(stream)):
                    return query
                self._misfits.add(query.id)
        raise none_fit(self.dropped, self.config)

    def fits_or_count(self, query: Query, dropped: Counter[str], of: int) -> bool:
        """Whether a query fits; otherwise it is counted in `dropped`, and the first one of a reason logged."""
        reason, error = self._fault(query)
        if reason is None:
            return True
        dropped[reason] += 1
        if error is not None:
            check_bad_rows(error, dropped[reason], of, self.config.max_bad_rows)
        if dropped[reason] == 1 and os.environ.get("RANK", "0") == "0":
            what = error or _setting(reason, self.config)
            log.warning("left out query %s: %s; further ones are only counted", query.id, what)
        return False

    def state_dict(self) -> dict[str, Any]:
        """What has been left out so far: counts by reason, and the queries; plain JSON."""
        return {"dropped": dict(self.dropped), "misfits": sorted(self._misfits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a `state_dict`: what it left out stays left out and is not counted again."""
        self.dropped, self._misfits = Counter(state["dropped"]), set(state["misfits"])

    def _token_ids(self, query: Query) -> tuple[list[int], list[int]]:
        """(compact, expanded) ids; not to be changed by the caller."""
        key = (query.id, query.question, tuple(image_key(image) for image in query.images))
        return self._ids.get(key, lambda: self._tokenize(query))

    def _tokenize(self, query: Query) -> tuple[list[int], list[int]]:
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
        texts = [text for text in parts if text]
        compact: list[int] = []
        for piece in self._layout(kinds):
            if isinstance(piece, int):
                compact.append(piece)
            else:
                compact += self._text_ids("".join(p if isinstance(p, str) else self._slot(p, texts) for p in piece))
        shown = iter([self._image_ids(image, query.id) for image in query.images])
        expanded: list[int] = []
        for i in compact:
            expanded += next(shown) if i == self._image_id else (i,)
        return compact, expanded

    def _slot(self, number: int, texts: list[str]) -> str:
        return texts[number] if number < len(texts) else self.config.system or ""

    def _layout(self, kinds: str) -> list[int | list[str | int]]:
        """The chat template around images ("i") and texts ("t"): ids that never change, texts of literals and slots."""
        if kinds not in self._layouts:
            count = kinds.count("t")
            numbers = iter(range(count))
            content = [
                {"type": "image"} if kind == "i" else {"type": "text", "text": f"\ue000{next(numbers)}\ue001"}
                for kind in kinds
            ]
            messages = [{"role": "user", "content": content}]
            if self.config.system is not None:
                system = [{"type": "text", "text": f"\ue000{count}\ue001"}]
                messages.insert(0, {"role": "system", "content": system})
            rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            self._layouts[kinds] = self._parse(rendered)
        return self._layouts[kinds]

    def _parse(self, rendered: str) -> list[int | list[str | int]]:
        layout: list[int | list[str | int]] = []
        for n, text in enumerate(self._added.split(rendered)):
            if n % 2:  # an added token
                layout.append(self.tokenizer.convert_tokens_to_ids(text))
            elif text:
                pieces = [int(p) if m % 2 else p for m, p in enumerate(_SLOT.split(text))]
                if len(pieces) == 1:
                    layout += self._text_ids(text)  # always the same
                else:
                    layout.append(pieces)
        return layout

    def _text_ids(self, text: str) -> list[int]:
        """Ids of ordinary text; what spells a special token is split like any other characters."""
        with self._one_at_a_time:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _image_ids(self, reference: Any, query_id: str) -> list[int]:
        height, width = image_size(reference, query_id, self.config.max_image_pixels)
        try:
            return self.family.image_ids(self.processor, height, width)
        except ValueError as error:
            raise _ImageShapeError(f"query {query_id}: {error}") from error

    def _image(self, reference: Any, query_id: str) -> Image.Image:
        def read() -> Image.Image:
            """Above `max_pixels` in the processor's size if possible, so that no photo fills the memory."""
            image = open_image(reference, query_id, self.config.max_image_pixels)
            return self.family.reduced(self.processor.image_processor, image)

        return self._images.get(image_key(reference), read)


class _ImageShapeError(ConfigError):
    """An image that the processor refuses for its proportions."""


class _BoundedCache:
    """Keeps the most recently used values while their sizes sum to at most `limit`."""

    def __init__(self, limit: int, size: Callable[[Any], int]) -> None:
        self.limit, self.size, self.held = limit, size, 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        self._values[key] = value
        self.held += self.size(value)
        while self.held > self.limit:
            _, oldest = self._values.popitem(last=False)
            self.held -= self.size(oldest)
        return value


def select_fitting(queries: Sequence[Query], encoder: PromptEncoder) -> tuple[list[Query], Counter[str]]:
    """The queries whose prompts are within the limits, and how many were left out for which reason.

    Raises:
        ConfigError: none fits, or the images of more than `data.max_bad_rows` of them cannot be read.
    """
    dropped: Counter[str] = Counter()
    kept = [query for query in queries if encoder.fits_or_count(query, dropped, len(queries))]
    if dropped and not kept:
        raise none_fit(dropped, encoder.config)
    return kept, dropped


def none_fit(dropped: Counter[str], config: DataConfig) -> ConfigError:
    """The error for a data set of which no query fits, naming the limit that most of them exceed."""
    setting = _setting(dropped.most_common(1)[0][0], config)
    return ConfigError(f"{setting}: no query fits (left out: {dict(dropped)}); raise the limit or use other data")


def _setting(reason: str, config: DataConfig) -> str:
    """`data.max_images=8` for a reason that is a limit."""
    value = getattr(config, reason.removeprefix("data."), None)
    return reason if value is None else f"{reason}={value}"
