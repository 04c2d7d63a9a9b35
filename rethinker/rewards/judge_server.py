"""Requests to a judge's server: one client, equal requests made once, and failures that say what to change.

The `openai` client waits and tries again by itself after connection errors and the statuses 408, 409, 429 and 5xx: as
long as `Retry-After` says, up to two minutes, else 0.5 s, doubled with each try up to 8 s. The caller bounds the time
and the number of requests.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from rethinker.config import one_line

LONGEST_QUOTE = 200
"""Characters of what a server said that a failure repeats."""

_REFUSED = {
    401: "{address} refuses the key: set the variable that api_key_env names",
    403: "{address} refuses the key: set the variable that api_key_env names",
    404: "{address} has no model={model}, or it is no OpenAI-style API: these mostly end in /v1",
    429: "{address} is asked too often: lower concurrency, or raise retries and timeout_s",
}
_REFUSED_OTHERWISE = (
    "{address} refuses the request: set pass_images: false if the judge reads texts alone, or a smaller max_new_tokens "
    "if its context is full"
)


class JudgeError(Exception):
    """A response that could not be judged: why, and what to change. What came is a note (PEP 678), so that failures of
    one kind have one text.
    """

    def __init__(self, reason: str, came: Any) -> None:
        super().__init__(reason)
        self.add_note(repr(came)[:LONGEST_QUOTE])


@dataclass(frozen=True)
class Server:
    """Where a judge is.

    Attributes:
        address: of an OpenAI-style API, as `http://127.0.0.1:8000/v1`.
        api_key_env: environment variable with the key; any key is sent without one.
        retries: of a request, besides its first try.
    """

    address: str
    api_key_env: str
    retries: int

    async def ask(self, request: dict[str, Any]) -> Any:
        """The answer to a chat request: mostly an openai.ChatCompletion, but the client checks no types.

        Raises:
            JudgeError: there is none.
        """
        import openai

        try:
            return await _client(self, asyncio.get_running_loop()).chat.completions.create(**request)
        except (openai.OpenAIError, ValueError) as error:  # ValueError: of JSON that is none
            failure = self._explained(error, request["model"])
            if isinstance(error, openai.NotFoundError) and (served := await self._models()):
                failure = JudgeError(f"{self.address} has no model={request['model']}, but {', '.join(served)}", error)
            raise failure from error

    async def _models(self) -> list[str]:
        """The names of the models there; none if it does not say."""
        import openai

        try:
            return [str(model.id) async for model in _client(self, asyncio.get_running_loop()).models.list()]
        except (openai.OpenAIError, ValueError, AttributeError, TypeError):
            return []

    def _explained(self, error: Exception, model: str) -> JudgeError:
        import openai

        body, status = getattr(error, "body", None), getattr(error, "status_code", None)
        said = body["message"] if isinstance(body, dict) and "message" in body else one_line(error)
        if isinstance(error, openai.APIConnectionError):
            reason, said = "{address} cannot be reached: start the judge there, or correct address", error.__cause__
        elif status is None:
            reason = "{address} answers what is no JSON: is it an OpenAI-style API? These mostly end in /v1"
        elif status >= 500:
            reason = "{address} fails: its own log says why"
        else:
            reason = _REFUSED.get(status, _REFUSED_OTHERWISE)
        reason = reason.format(address=self.address, model=model)
        return JudgeError(reason + (f" (status {status})" if status else ""), said)


@lru_cache(maxsize=8)
def _client(server: Server, loop: asyncio.AbstractEventLoop) -> Any:
    """One client, and so one pool of connections, for all requests of a loop: they belong to it."""
    import openai

    host = urlsplit(server.address).hostname or ""
    # A proxy, as http_proxy names it, cannot reach this machine's own addresses.
    direct = host in ("localhost", "::1") or host.startswith("127.")
    return openai.AsyncOpenAI(
        base_url=server.address,
        api_key=os.environ.get(server.api_key_env) or "none",
        max_retries=server.retries,
        timeout=openai.Timeout(None, connect=10.0),
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if direct else None,
    )


@dataclass
class _Call:
    task: asyncio.Task[float]
    waiting: int = 0


_under_way: dict[bytes, _Call] = {}


async def once(key: bytes, asking: Coroutine[Any, Any, float]) -> float:
    """What `asking` returns or raises, or what another one of the same key does that is under way.

    It is broken off when no caller waits for it any more.
    """
    if key in _under_way:
        asking.close()
    else:
        _under_way[key] = _Call(asyncio.ensure_future(asking))
    call = _under_way[key]
    call.waiting += 1
    try:
        return await asyncio.shield(call.task)
    finally:
        call.waiting -= 1
        if not call.waiting or call.task.done():
            call.task.cancel()  # nothing, if it has ended
            if _under_way.get(key) is call:
                del _under_way[key]
