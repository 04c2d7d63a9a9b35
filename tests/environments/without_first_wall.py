"""The process of `python` as if code got through the first wall: anything may be said, with all builtins."""

from __future__ import annotations

import builtins

from rethinker.environments import python, sandbox


def serve(fd: int) -> None:
    sandbox.check = lambda tree: None
    sandbox.BUILTINS = vars(builtins)
    python.serve(fd)
