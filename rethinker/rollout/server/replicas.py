"""Several vLLM servers that serve the same model: requests are spread over them, and one that is lost is left out.

A server is lost when its connection breaks and it does not answer /health, or when it is silent for SILENT_S. Its open
requests go to the others. It stays lost: it would have missed weights.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import aiohttp

from rethinker.rollout.deadline import Deadline

T = TypeVar("T")
log = logging.getLogger(__name__)

SILENT_S = 60.0  # without an answer to /health for so long a server is lost; long prompts may keep it busy for seconds
PING_S = 10.0
IN_FLIGHT = 64  # requests of one rank at one server: with a group of 8, as much as vLLM batches
_TRIES = 3  # of one request at a server that says it is healthy
NO_LIMIT = aiohttp.ClientTimeout(total=None)


class ReplicaLost(RuntimeError):
    """A server that does not answer any more."""

    def __init__(self, address: str, reason: str):
        super().__init__(f"the rollout server {address} is lost: {reason}")
        self.address, self.reason = address, reason


class Disconnected(ReplicaLost):
    """A connection that was not made or broke; its server may be well all the same."""


class NoServerLeft(RuntimeError):
    """All servers are lost."""


class ServerError(RuntimeError):
    """A server that answers, but with an error: its own words."""

    def __init__(self, address: str, path: str, status: int, words: str):
        answer = words[:500] or "(no text)"
        super().__init__(f"the rollout server {address} answered {path} with HTTP {status}: {answer}")
        self.status = status


class Replicas:
    """HTTP clients of the servers, driven by one event loop in a thread of its own.

    Attributes:
        alive: addresses (`http://host:port`) of the servers in use.
        lost: why each of the others is not.
    """

    def __init__(self, addresses: Iterable[str]):
        self.alive = list(addresses)
        self.lost: dict[str, str] = {}
        self._waiting_for: Counter[str] = Counter()  # open requests by address
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="rollout servers", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def each(self, path: str, deadline: Deadline, body: Any = None, *, keep_all: bool = False) -> dict[str, Any]:
        """Send the same POST to every server; their answers by address. Lost ones are left out and dropped.

        Args:
            body: of the request, or a function of the address.
            keep_all: raise when one is lost, instead of going on with the others.
        """

        async def work() -> dict[str, Any]:
            calls = {a: self.call(a, path, body(a) if callable(body) else body) for a in self.alive}
            ends = await asyncio.gather(*calls.values(), return_exceptions=True)
            for end in ends:
                if isinstance(end, ReplicaLost) and not keep_all:
                    self.drop(end)
                elif isinstance(end, BaseException):
                    raise end
            return {address: end for address, end in zip(calls, ends, strict=True) if address in self.alive}

        return self._wait(work(), deadline)

    def worker(self, method: str, deadline: Deadline, *, keep_all: bool = False, **arguments: Any) -> dict[str, Any]:
        """Call a method of server/worker.py at every server; what the first worker of each answers, by address."""
        body = {"method": method, "kwargs": arguments}
        answers = self.each("/collective_rpc", deadline, body, keep_all=keep_all)
        return {address: answer["results"][0] for address, answer in answers.items()}

    def spread(
        self, count: int, ask: Callable[[str, int], Awaitable[T]], deadline: Deadline, at_once: int = IN_FLIGHT
    ) -> list[T]:
        """Ask for 0 ... count - 1, each at some server, evenly; the answers in that order.

        Args:
            ask: (address, number) to the answer, by way of `call`.
            at_once: most of them at a server at a time.
        """
        waiting, answers = deque(range(count)), {}

        async def slot(address: str) -> None:
            while waiting and address in self.alive:
                number = waiting.popleft()
                try:
                    answers[number] = await self._persistently(ask, address, number)
                except ReplicaLost as loss:
                    waiting.append(number)
                    self.drop(loss)

        async def work() -> None:
            while waiting:
                slots = min(at_once, -(-len(waiting) // len(self.alive)))
                async with asyncio.TaskGroup() as group:  # one error ends all
                    for address in self.alive * slots:
                        group.create_task(slot(address))

        self._wait(work(), deadline, lambda: f"{len(answers)} requests ended; ")
        return [answers[number] for number in range(count)]

    async def call(self, address: str, path: str, body: Any = None) -> Any:
        """Send one POST; its answer as JSON (None if empty).

        Raises:
            Disconnected: no connection, or it broke.
            ReplicaLost: the server has become silent.
            ServerError: an HTTP error.
        """
        request = asyncio.ensure_future(self._send("POST", address, path, body))
        self._waiting_for[address] += 1
        try:
            while not (await asyncio.wait([request], timeout=PING_S))[0]:
                await self._check_health(address)
            return json.loads(request.result().strip() or "null")
        finally:
            request.cancel()
            self._waiting_for[address] -= 1

    async def _send(self, method: str, address: str, path: str, body: Any = None) -> str:
        try:
            # Every request has a connection of its own: one kept alive may be closed just as it is used again.
            async with aiohttp.request(method, address + path, json=body, timeout=NO_LIMIT) as response:
                text = await response.text(errors="replace")
                if response.status >= 400:
                    raise ServerError(address, path, response.status, text)
                return text
        except (aiohttp.ClientError, OSError) as error:
            raise Disconnected(address, f"{type(error).__name__}: {error}") from error

    async def _check_health(self, address: str) -> None:
        """Raises ReplicaLost, with a server's own words, if it is not healthy."""
        try:
            await asyncio.wait_for(self._send("GET", address, "/health"), SILENT_S)
        except TimeoutError as error:
            raise ReplicaLost(address, f"silent for {SILENT_S:g} s") from error
        except ServerError as error:
            raise ReplicaLost(address, f"/health: HTTP {error.status}") from error

    async def _persistently(self, ask: Callable[[str, int], Awaitable[T]], address: str, number: int) -> T:
        """Ask again after an error that is not the request's fault, as long as the server is healthy."""
        for _ in range(_TRIES - 1):
            try:
                return await ask(address, number)
            except Disconnected:
                pass
            except ServerError as error:
                if error.status < 500:
                    raise
                await asyncio.sleep(1)  # until the server knows that its engine is dead
            await self._check_health(address)
        return await ask(address, number)

    def drop(self, loss: ReplicaLost) -> None:
        """Go on without a server.

        Raises:
            NoServerLeft: it was the last one.
        """
        if loss.address in self.alive:
            self.alive.remove(loss.address)
            self.lost[loss.address] = loss.reason
            log.warning("%s; its requests go to the other %d", loss, len(self.alive))
        if not self.alive:
            reasons = "; ".join(f"{address}: {reason}" for address, reason in self.lost.items())
            raise NoServerLeft(
                f"no rollout server is left ({reasons}); start them again with `rethinker serve`, then go on from the "
                "last checkpoint with --resume auto"
            )

    def _wait(self, work: Coroutine[Any, Any, Any], deadline: Deadline, progress: Callable[[], str] = str) -> Any:
        """Wait for work in the loop's thread, while the deadline and requests to stop are watched.

        Raises:
            TimeoutError: the deadline passed; the message names the servers that had not answered.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not concurrent.futures.wait([future], timeout=0.05).done:
                silent = ", ".join(f"{address} ({n})" for address, n in self._waiting_for.copy().items() if n)
                deadline.check(f"{progress()}no answer yet from {silent or 'the servers'}")
            return future.result()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        except BaseException:
            future.cancel()  # closes its connections, at which vLLM aborts the requests
            raise
