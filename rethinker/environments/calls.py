"""Tool calls in a turn's text, and what is wrong with them.

A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), or in Qwen3.5's form
`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`. What can only be meant in one way
is taken as that; of anything else the model reads what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rethinker.samples import IMAGE_MARK

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_SPACE = re.compile(r"\s*")
_FUNCTION = re.compile(r"<function=([^<>\s]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^<>\s]+)>")
_DECODER = json.JSONDecoder(strict=False)  # line breaks within strings, as in code, are meant as such


class CallError(Exception):
    """Why a call has no result: `reason` is the word that is counted, the text what the model reads."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Call:
    """One call of a turn; with an `error` it names no tool."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: CallError | None = None


def calls_of(text: str, most: int) -> list[Call]:
    """The calls of a turn, in order; those beyond the first `most` are not read, and refused. Never raises."""
    calls: list[Call] = []
    at = text.find(OPEN)
    while at >= 0:
        if len(calls) == most:
            refused = CallError("calls", f"not made: there may be {most} calls in a turn")
            return [*calls, *[Call(error=refused)] * text.count(OPEN, at)]
        start = at + len(OPEN)
        try:
            call, end = _read(text, start)
        except CallError as error:
            call = Call(error=error)
            # To the end of the block, or to the next one where this one has none.
            end = min((place for place in (text.find(CLOSE, start), text.find(OPEN, start)) if place >= 0), default=-1)
        calls.append(call)
        at = text.find(OPEN, end) if end >= 0 else -1
    return calls


def takes(call: Call, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """The call's arguments, where they are those of its tool.

    Raises:
        CallError: one is missing, or not among them.
    """
    known = (*required, *optional)
    for name in required:
        if name not in call.arguments:
            raise CallError("arguments", f"{call.name} needs the argument {name}")
    for name in call.arguments:
        if name not in known:
            raise CallError("arguments", f"{call.name} has no argument {name[:40]!r}; it has {', '.join(known)}")
    return call.arguments


def harmless(text: str) -> str:
    """A text in which nothing marks the place of an image."""
    return text.replace(IMAGE_MARK, "< image >")


def _read(text: str, start: int) -> tuple[Call, int]:
    """The call whose block begins at `start`, and where the block ends.

    Not the next CLOSE ends it but the one after a whole value: code may hold the word.
    """
    start = _skip(text, start)
    if named := _FUNCTION.match(text, start):
        name, arguments, end = named[1], *_parameters(text, named.end())
    else:
        said, end = _json(text, start)
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            raise _malformed('it is no object with "name" and "arguments"')
        name, arguments = said["name"], said.get("arguments", {})
        if isinstance(arguments, str):  # encoded once more, as OpenAI's interface does
            encoded = arguments
            arguments, rest = _json(encoded, _skip(encoded, 0))
            if _skip(encoded, rest) < len(encoded):
                raise _malformed('its "arguments" are more than an object')
        if not isinstance(arguments, dict):
            raise _malformed('its "arguments" are no object')
    end = _skip(text, end)
    if not text.startswith(CLOSE, end):
        raise _malformed(f"{CLOSE} does not follow it")
    return Call(name, arguments), end + len(CLOSE)


def _json(text: str, start: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError, IndexError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else getattr(error, "msg", "numbers too long")
        raise _malformed(f"it is no JSON ({said})") from None


def _parameters(text: str, at: int) -> tuple[dict[str, Any], int]:
    arguments = {}
    while named := _PARAMETER.match(text, at):
        end = text.find("</parameter>", named.end())
        if end < 0:
            raise _malformed("</parameter> is missing")
        arguments[named[1]] = text[named.end() : end].removeprefix("\n").removesuffix("\n")  # a text, as code is
        at = _skip(text, end + len("</parameter>"))
    if not text.startswith("</function>", at):
        raise _malformed("</function> is missing")
    return arguments, at + len("</function>")


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _malformed(what: str) -> CallError:
    form = f'{OPEN}\n{{"name": ..., "arguments": {{...}}}}\n{CLOSE}'
    return CallError("malformed", f"the call cannot be read: {what}; write {form}")
