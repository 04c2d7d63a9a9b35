"""Runs what `environment.use` names: at once where it cannot take long, else in processes that can be killed.

`crop` and `verify` run in the caller's thread and answer with futures that are done. `python` and environments of the
user's run in `environment.workers` processes with a thread each; calls beyond these wait in a queue, and whatever a
call does, the others get their own answers. No signal is used, so any thread may ask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from rethinker.config import ConfigError, EnvironmentConfig, RethinkConfig
from rethinker.environments import TOOLS, Observation, load
from rethinker.environments.crop import Cropper, ShownSize
from rethinker.environments.process import EnvironmentProcess
from rethinker.environments.python import PythonProcess
from rethinker.environments.tools import Tools
from rethinker.environments.verify import Verify
from rethinker.runtime.killable import Killable, LostError
from rethinker.samples import Query

log = logging.getLogger(__name__)
T = TypeVar("T")

LARGE = 16_384
"""Side of an image, pixels, that no model sees in full."""


@dataclass(frozen=True)
class Kept:
    """The state of a response in an environment of the user's, of the query with this id; or, instead of it, why it has
    none. `images` counts those that it was shown."""

    query_id: str
    pickled: bytes = b""
    images: int = 0
    failure: str = ""


class Runner:
    """The run's environment; states are opaque, and a step leaves the one that it was given as it was.

    Args:
        config: what runs, and its limits.
        open_image: (reference, query id) to the query's image in full.
        shown_size: (width, height) of an image to the same as the model sees it.
        triggers: `rethink.triggers`, for `verify`.

    Raises:
        ConfigError: as `load`.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        open_image: Callable[[Any, str], Image.Image],
        shown_size: ShownSize,
        triggers: Mapping[str, str] | None = None,
    ) -> None:
        named = load(config)
        assert named, "environment.use is empty: there is nothing to run"
        self._config, self._closed = config, False
        self._tools: Tools | None = None
        self._verify: Verify | None = None
        self._processes: list[Killable] = []
        if callable(named):
            most_pixels = 2 * math.prod(shown_size(LARGE, LARGE))  # other shapes are rounded to more than a square is
            self._processes = [EnvironmentProcess(config, most_pixels) for _ in range(config.workers)]
        elif set(named) <= set(TOOLS):
            cropper = Cropper(config.boxes, open_image, shown_size)
            self._tools = Tools(named, config, cropper, self._run_code)
            if "python" in named:
                self._processes = [PythonProcess(config) for _ in range(config.workers)]
        else:
            triggers = RethinkConfig().triggers if triggers is None else triggers
            if not triggers:
                raise ConfigError("environment.use=[verify] needs a trigger; give rethink.triggers one")
            self._verify = Verify(triggers)
        self._idle = list(self._processes)
        self._pool = ThreadPoolExecutor(max(1, len(self._processes)), "environment")
        self._logged: set[tuple[str, ...]] = set()

    @property
    def inline(self) -> bool:
        """Whether all of it runs in the caller's thread and at once, so that a run can be repeated to the bit."""
        return not self._processes

    def start(self) -> None:
        """Start the processes, without waiting for them, so that no turn need wait for their imports."""
        for process in self._processes:
            process.start()

    def reset(self, query: Query) -> Future[Any]:
        """The state of a response that begins.

        Raises (the future): ConfigError, where no process starts; RuntimeError, where the runner is closed. What an
            environment does wrong is no error: its first step says so.
        """
        if self._tools or self._verify:
            return self._at_once(lambda: (self._tools or self._verify).reset(query))
        return self._later(lambda: self._reset(query))

    def step(self, state: Any, text: str) -> Future[tuple[Any, Observation]]:
        """The answer to a turn, and the state after it.

        A hang, crash or error is an answer, too: a tool's is a text to the model, and an environment's of the user's
        ends the response; its `failures` name it. Raises as `reset`.

        Args:
            state: what `reset` or the step before it gave.
            text: the turn, special tokens included, but its end token.
        """
        if self._verify:
            return self._at_once(lambda: self._verify.step(state, text))
        if not self._tools:
            return self._later(lambda: self._step(state, text))
        calls = self._tools.calls(text)
        run = self._later if self._tools.needs_process(calls) else self._at_once
        return run(lambda: self._tools.answer(state, calls))

    def close(self) -> None:
        """End the processes; none is left behind. A call under way fails with RuntimeError, one that waits is
        cancelled."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()
        self._pool.shutdown()

    def _at_once(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            if self._closed:
                raise RuntimeError("the environment is closed")
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future

    def _later(self, work: Callable[[], T]) -> Future[T]:
        """A call of the pool, which has a thread for each process: one of these is idle whenever a thread is."""
        return self._at_once(work) if self._closed else self._pool.submit(work)

    def _ask(self, message: Any) -> Any:
        """What a process answers.

        Raises:
            LostError: it was lost.
        """
        process = self._idle.pop()
        try:
            return process.ask(message, self._config.timeout_s)
        finally:
            self._idle.append(process)

    def _run_code(self, code: str, most: int) -> tuple[str, str]:
        try:
            return self._ask((code, most))
        except LostError as lost:
            return f"error: {lost}", lost.reason

    def _reset(self, query: Query) -> Kept:
        answer = self._answer(("reset", query), query.id)
        return Kept(query.id, failure=answer) if isinstance(answer, str) else Kept(query.id, answer[0])

    def _step(self, state: Kept, text: str) -> tuple[Kept, Observation]:
        if state.failure:
            return state, Observation(done=True, failures=(state.failure,))
        left = self._config.max_images - state.images
        answer = self._answer(("step", state.pickled, text, left), state.query_id)
        if isinstance(answer, str):
            return Kept(state.query_id, failure=answer), Observation(done=True, failures=(answer,))
        pickled, observation = answer
        return Kept(state.query_id, pickled, state.images + len(observation.images)), observation

    def _answer(self, message: tuple[Any, ...], query_id: str) -> tuple[bytes, Observation | None] | str:
        """What the user's environment answers, or the reason why it does not; each is named once in the log."""
        try:
            answer = self._ask(message)
        except LostError as lost:
            answer = f"{lost.reason}: {lost}"
        if not isinstance(answer, str):
            return answer
        kind = message[0], *answer.split(":")[:2]  # what follows may name the query
        if kind not in self._logged:
            self._logged.add(kind)
            log.warning(
                "environment.use=[%s]: %s failed (%s): query %r", self._config.use[0], message[0], answer, query_id
            )
        return answer.partition(":")[0]
