"""An environment of the user's in a process that can be killed: its handle in the trainer, and what runs inside.

The state of a response is pickled there and kept here, so that a process that dies takes no other response with it, and
any process may take any turn.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rethinker.config import EnvironmentConfig
from rethinker.environments import Environment, Observation, load
from rethinker.environments.calls import CallError, harmless
from rethinker.environments.images import png_of
from rethinker.environments.texts import CHARACTERS_PER_TOKEN, cut_middle, whole
from rethinker.runtime.killable import Killable, answer_all, described, limit_memory, prepared
from rethinker.samples import IMAGE_MARK

Answer = tuple[bytes, Observation | None] | str
"""(the pickled state, the answer to a turn), or what went wrong as "reason: detail"."""


class EnvironmentProcess(Killable):
    """The trainer's handle of such a process. A message is ("reset", query), or ("step", pickled state, text, most
    images); the answer is an `Answer`.

    Args:
        most_pixels: of an image that it shows; larger ones are reduced.
    """

    inside = "rethinker.environments.process"
    closed = "the environment is closed"

    def __init__(self, config: EnvironmentConfig, most_pixels: int) -> None:
        super().__init__(f"environment.use=[{config.use[0]}]", (config, most_pixels), config.memory_gb)


def serve(fd: int) -> None:
    """Answer calls until the trainer closes the connection or dies."""
    link = Connection(fd)
    made = prepared(link, _prepare)
    if made is None:
        return
    environment, config, most_pixels = made
    with asyncio.Runner() as loop:

        def finished(value: Any) -> Any:
            return loop.run(_awaited(value)) if inspect.isawaitable(value) else value

        def answer(message: tuple[Any, ...]) -> Answer:
            try:
                return _answer(environment, message, finished, config, most_pixels)
            except MemoryError:
                raise
            except CallError as error:
                return f"{error.reason}: {error}"
            except BaseException as error:  # SystemExit too: it is the call's, not the process's
                return f"error: {described(error)}"

        answer_all(link, answer, lambda message: config.timeout_s)


def _prepare(opening: tuple[EnvironmentConfig, int]) -> tuple[Environment, EnvironmentConfig, int]:
    config, most_pixels = opening
    environment = load(config)()
    limit_memory(config.memory_gb)
    return environment, config, most_pixels


async def _awaited(value: Any) -> Any:
    return await value


def _answer(
    environment: Environment,
    message: tuple[Any, ...],
    finished: Callable[[Any], Any],
    config: EnvironmentConfig,
    most_pixels: int,
) -> Answer:
    kind, *rest = message
    if kind == "reset":
        return pickle.dumps(finished(environment.reset(*rest))), None
    pickled, text, most_images = rest
    state = pickle.loads(pickled)
    observation = plain(finished(environment.step(state, text)), config, most_images, most_pixels)
    return pickle.dumps(state), observation


def plain(given: Any, config: EnvironmentConfig, most_images: int, most_pixels: int) -> Observation:
    """What an environment answered, checked: the images as PNG, their marks in a text that is bounded.

    Raises:
        CallError: `error` (not what an Observation holds), `images` (more than `most_images`), `image` or `size`.
    """
    if not isinstance(given, Observation):
        raise CallError("error", f"step returned a {type(given).__name__}, and is to return an Observation")
    _check_fields(given)
    images = tuple(given.images)
    if len(images) > most_images:
        limit = f"environment.max_images={config.max_images} leaves {most_images}"
        raise CallError("images", f"the Observation has {len(images)} images, and {limit}")
    marks = given.text.count(IMAGE_MARK) if images else 0
    if marks not in (0, len(images)):
        raise CallError("error", f"{marks} {IMAGE_MARK} marks for {len(images)} images; give one each, or none")
    text, longest = given.text, CHARACTERS_PER_TOKEN * config.max_text_tokens
    if not marks or len(text) > longest:  # of a long one the middle goes, and a mark may stand there
        words = harmless(text.replace(IMAGE_MARK, "") if marks else text)
        text = IMAGE_MARK * len(images) + cut_middle(words, longest)
    pngs = tuple(png_of(image, most_pixels) for image in images)
    return Observation(  # of plain types: the trainer unpickles it
        whole(text),
        pngs,
        bool(given.done),
        float(given.reward),
        "user" if given.role == "user" else "assistant",
        given.calls,
        tuple(map(str, given.failures)),
    )


def _check_fields(given: Observation) -> None:
    wrong = None
    if not isinstance(given.text, str):
        wrong = "text is no str"
    elif isinstance(given.images, str | bytes):
        wrong = "images is no sequence of images"
    elif given.role not in ("user", "assistant"):
        wrong = "role is neither user nor assistant"
    elif given.role == "assistant" and len(given.images):
        wrong = "an assistant's turn has images"
    elif isinstance(given.reward, str) or not math.isfinite(float(given.reward)):
        wrong = "reward is no finite number"
    elif not isinstance(given.failures, tuple) or not all(
        isinstance(f, str) and f.isidentifier() for f in given.failures
    ):
        wrong = "failures is no tuple of words"
    elif type(given.calls) is not int or given.calls < 0:
        wrong = "calls is no count"
    if wrong:
        raise CallError("error", f"the Observation's {wrong}")
