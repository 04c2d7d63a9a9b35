"""Several vLLM servers that serve the same model: requests are spread over them, and one that is lost is left out.

A server is lost when its connection breaks or it is silent for SILENT_S, and it then does not answer /health. Its open
requests go to the others. It stays lost: it would have missed weights.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import aiohttp

from rethinker.rollout.deadline import Deadline

log = logging.getLogger(__name__)

SILENT_S = 60.0  # without an answer to /health for so long a server is lost; long prompts may keep it busy for seconds
PING_S = 10.0
IN_FLIGHT = 64  # requests of one rank at one server: with a group of 8, as much as vLLM batches
_TRIES = 3  # of one request at a server that says it is healthy


class ReplicaLost(RuntimeError):
    """A server that does not answer any more."""

    def __init__(self, address: str, reason: str):
        super().__init__(f"the rollout server {address} is lost: {reason}")
        self.address = address
        self.reason = reason


class NoServerLeft(RuntimeError):
    """All servers are lost."""


class ServerError(RuntimeError):
    """A server that answers, but with an error: its own words."""

    def __init__(self, address: str, path: str, status: int, words: str):
        super().__init__(f"the rollout server {address} answered {path} with HTTP {status}: {words}")
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
        self._waiting_for: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout servers", daemon=True)
        self._thread.start()
        self._session = asyncio.run_coroutine_threadsafe(_open_session(), self._loop).result()

    def run(self, work: Coroutine[Any, Any, Any], deadline: Deadline, progress: Callable[[], str] = str) -> Any:
        """Wait for work in the loop's thread, while the deadline and requests to stop are watched.

        Raises:
            TimeoutError: the deadline passed; the message names the servers that had not answered.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not concurrent.futures.wait([future], timeout=0.05).done:
                deadline.check("; ".join(filter(None, [progress(), self._open_requests()])))
            return future.result()
        except BaseException:
            future.cancel()  # closes its connections, at which vLLM aborts the requests
            raise

    def _open_requests(self) -> str:
        open_at = [f"{address} ({count})" for address, count in self._waiting_for.items() if count]
        return f"no answer yet from {', '.join(open_at)}" if open_at else ""

    async def call(self, address: str, path: str, body: Any = None, *, get: bool = False) -> Any:
        """One request; its answer as JSON (None if empty).

        Raises:
            ReplicaLost: no connection, or it broke.
            ServerError: an HTTP error.
        """
        self._waiting_for[address] = self._waiting_for.get(address, 0) + 1
        try:
            async with self._session.request("GET" if get else "POST", address + path, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise ReplicaLost(address, f"{type(error).__name__}: {error}") from error
        finally:
            self._waiting_for[address] -= 1
        if response.status >= 400:
            raise ServerError(address, path, response.status, _words(text))
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise ServerError(address, path, response.status, f"no JSON but {text[:200]!r}") from None

    async def each(self, path: str, body: Any = None, *, get: bool = False, keep_all: bool = False) -> dict[str, Any]:
        """The same request to every server; their answers by address. Lost ones are left out and dropped.

        Args:
            body: of the request, or a function of the address.
            keep_all: raise when one is lost, instead of going on with the others.
        """

        async def one(address: str) -> Any:
            own = body(address) if callable(body) else body
            return await self._watched(address, self.call(address, path, own, get=get))

        addresses = list(self.alive)
        answers = await asyncio.gather(*map(one, addresses), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, ReplicaLost) and not keep_all:
                self.drop(answer)
            elif isinstance(answer, BaseException):
                raise answer
        return {a: answer for a, answer in zip(addresses, answers, strict=True) if a in self.alive}

    async def spread(
        self, keys: Iterable[str], ask: Callable[[str, str], Awaitable[Any]], answers: dict[str, Any]
    ) -> None:
        """Ask for every key at some server, evenly, until `answers` has them all.

        Args:
            keys: of the requests.
            ask: (address, key) to the answer, by way of `call`.
            answers: filled as they come, in any order.

        Raises:
            NoServerLeft: every server is lost.
        """
        waiting = deque(keys)

        async def slot(address: str) -> None:
            while waiting:
                key = waiting.popleft()
                try:
                    answers[key] = await self._persistently(address, lambda key=key: ask(address, key))
                except BaseException:
                    waiting.append(key)
                    raise

        async def serve(address: str, slots: int) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(slots):
                    group.create_task(slot(address))

        while waiting:
            slots = min(IN_FLIGHT, -(-len(waiting) // len(self.alive)))
            addresses = list(self.alive)
            ends = await asyncio.gather(
                *(self._watched(address, serve(address, slots)) for address in addresses), return_exceptions=True
            )
            for end in ends:
                if isinstance(end, ReplicaLost):
                    self.drop(end)
                elif isinstance(end, BaseException):
                    raise end

    def drop(self, loss: ReplicaLost) -> None:
        """Go on without a server.

        Raises:
            NoServerLeft: it was the last one.
        """
        if loss.address in self.alive:
            self.alive.remove(loss.address)
            self.lost[loss.address] = loss.reason
            log.warning(
                "the rollout server %s is lost (%s); its requests go to the other %d",
                loss.address,
                loss.reason,
                len(self.alive),
            )
        if not self.alive:
            reasons = "; ".join(f"{address}: {reason}" for address, reason in self.lost.items())
            raise NoServerLeft(
                f"no rollout server is left ({reasons}); start them again with `rethinker serve`, then go on from the "
                "last checkpoint with --resume auto"
            )

    def close(self) -> None:
        """Close all connections and end the thread."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _watched(self, address: str, work: Coroutine[Any, Any, Any]) -> Any:
        """Do work at a server until it is silent. Of several errors the first loss counts, else the first."""
        task, watch = asyncio.ensure_future(work), asyncio.ensure_future(self._silence(address))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ReplicaLost(address, watch.result())
            return task.result()
        except BaseExceptionGroup as group:
            errors = sorted(group.exceptions, key=lambda error: not isinstance(error, ReplicaLost))
            raise errors[0] from None
        finally:
            task.cancel(), watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def _silence(self, address: str) -> str:
        """Return, with the reason, once a server is lost."""
        while True:
            await asyncio.sleep(PING_S)
            if reason := await self._illness(address):
                return reason

    async def _illness(self, address: str) -> str | None:
        """Why a server is not healthy, in its own words; None if it is."""
        try:
            async with asyncio.timeout(SILENT_S), self._session.get(f"{address}/health") as response:
                return None if response.status == 200 else f"/health: HTTP {response.status}"
        except TimeoutError:
            return f"silent for {SILENT_S:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    async def _persistently(self, address: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask again when a connection broke although the server is well; lost if its engine died under the request."""
        for attempt in range(1, _TRIES + 1):
            try:
                return await ask()
            except (ReplicaLost, ServerError) as error:
                if isinstance(error, ServerError) and error.status < 500:
                    raise
                if isinstance(error, ServerError):
                    await asyncio.sleep(1)  # until it knows that its engine is dead
                if reason := await self._illness(address):
                    reason = f"{error}; {reason}" if isinstance(error, ServerError) else reason
                    raise ReplicaLost(address, reason) from error
                if isinstance(error, ServerError) or attempt == _TRIES:
                    raise


async def _open_session() -> aiohttp.ClientSession:
    # A new connection for every request: one kept alive may be closed by the server just as it is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def _words(text: str) -> str:
    """The message in an error's body."""
    try:
        body = json.loads(text)
    except ValueError:
        return text[:500] or "(no text)"
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
