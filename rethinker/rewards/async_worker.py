"""A process for one async function: many calls at once in one event loop, each with a deadline of its own.

A call that waits beyond its deadline is cancelled and fails alone. One that blocks the loop, or kills the process,
takes the others under way with it; these are called once more, one at a time, so that only the guilty one fails.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rethinker.rewards import worker as process
from rethinker.rewards.functions import RewardFunction, call_with
from rethinker.rewards.worker import LOOK_S, SKIPPED, Asked, Verdict, Worker, failure_of
from rethinker.runtime.killable import OUT_OF_MEMORY, LostError, end_if_stuck


class AsyncWorker(Worker):
    """The trainer's handle of such a process."""

    inside = "rethinker.rewards.async_worker"

    def check_all(
        self, items: Sequence[Any], asked: Callable[[Any], Asked], broken_off: threading.Event
    ) -> list[Verdict]:
        """What the function says of each item, at most `concurrency` of them at a time; `asked` says of one what the
        function is asked, when its turn comes: the images of an episode are large.

        The rest is SKIPPED once `broken_off` is set, or a call failed and `on_failure` is stop. Raises as `check`.
        """
        with self._in_use():
            try:
                return self._check_all(items, asked, broken_off)
            except BaseException:  # of `asked`: what is under way would answer the next one's calls
                self.kill()
                raise

    def _check_all(
        self, items: Sequence[Any], asked: Callable[[Any], Asked], broken_off: threading.Event
    ) -> list[Verdict]:
        (entry,) = self.entries
        patience = 1.5 * entry.timeout_s + 1.0  # by then a loop that runs has answered
        verdicts = [SKIPPED] * len(items)
        waiting, suspects = deque(range(len(items))), deque[int]()
        under_way: dict[int, float] = {}  # place of the response -> when to give up, the earliest first
        alone = stop = False  # whether the call under way is a suspect's; whether one failed that must not
        while waiting or suspects or under_way:
            lost = ""  # why calls under way were lost
            if stop or broken_off.is_set():
                self.kill()  # and with it the calls under way
                break
            if not under_way:
                self._get_ready()
                alone = bool(suspects)
            queue, most = (suspects, 1) if alone else (waiting, entry.concurrency)
            turns = [queue.popleft() for _ in range(min(len(queue), most - len(under_way)))]
            calls = [(place, asked(items[place])) for place in turns]  # an error here is no crash of the process
            under_way |= dict.fromkeys(turns, time.monotonic() + patience)
            try:
                for call in calls:
                    self._link.send(call)
                left = next(iter(under_way.values())) - time.monotonic()
                if self._link.poll(max(0.0, min(left, LOOK_S))):
                    place, verdict = self._link.recv()
                    del under_way[place]
                elif left > 0:
                    continue
                else:
                    lost = failure_of(LostError("timeout", ""), entry)
            except (EOFError, OSError):
                lost = failure_of(self._obituary(), entry)
            if lost:
                self.kill()
                if len(under_way) > 1:
                    suspects.extend(under_way)
                    under_way.clear()
                    continue
                place, verdict = under_way.popitem()[0], (0.0, lost)
            verdicts[place] = verdict
            stop = bool(verdict[1]) and entry.on_failure == "stop"
        return verdicts


def serve(fd: int) -> None:
    """Answer calls, many at once, until the trainer closes the connection or dies."""
    link = Connection(fd)
    functions = process.load_functions(link)
    if functions is not None:
        asyncio.run(_answer(link, functions[0]))


async def _answer(link: Connection, function: RewardFunction) -> None:
    loop, tasks, worker = asyncio.get_running_loop(), set[asyncio.Task](), os.getpid()

    def read() -> None:
        while True:
            try:
                place, asked = link.recv()
            except (EOFError, OSError):
                os._exit(0)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            loop.call_soon_threadsafe(begin, place, asked)

    def begin(place: int, asked: Asked) -> None:
        task = loop.create_task(answer(place, asked))
        tasks.add(task)  # the loop itself would forget it
        task.add_done_callback(tasks.discard)

    async def answer(place: int, asked: Asked) -> None:
        call = loop.create_task(_guarded(function, asked))
        # Not wait_for: it would wait for a call that catches its cancellation and goes on.
        done, _ = await asyncio.wait({call}, timeout=function.entry.timeout_s)
        call.cancel()
        late = 0.0, f"timeout: {function.entry.timeout_setting}={function.entry.timeout_s}"
        if os.getpid() != worker:  # a reward that forked and let the child return
            os._exit(0)
        try:
            link.send((place, call.result() if done else late))
        except OSError:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        end_if_stuck(function.entry.timeout_s)
        await asyncio.sleep(function.entry.timeout_s / 2)


async def _guarded(function: RewardFunction, asked: Asked) -> Verdict:
    """A call that may raise anything."""
    try:
        return process.verdict(await call_with(function, [asked]))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # SystemExit and a cancellation of its own, too: they are the call's
        return process.failed(error)
