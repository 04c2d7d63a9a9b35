"""The tool `python`: code of the policy's in a process that can be killed and can do nothing but compute.

The code has two walls around it. What it may say is decided on its syntax tree (sandbox.py); what its process may do is
decided by the kernel: no file, socket or program can be opened or started, nothing can be written, memory and time are
bounded. Either holds by itself. Answers come back as JSON, not as pickles, which could hold code for the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import warnings
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from rethinker.config import EnvironmentConfig
from rethinker.environments.sandbox import MODULES, run
from rethinker.environments.texts import CHARACTERS_PER_TOKEN, whole
from rethinker.runtime.killable import Killable, answer_all, limit_memory, prepared

LONGEST_CODE = 100_000
"""Characters."""
DESCRIPTION = {
    "name": "python",
    "description": "Runs Python code and shows what it prints, or the value of its last expression. Nothing is kept "
    f"from call to call, there are no files and no network, and only these modules: {', '.join(MODULES)}.",
    "parameters": {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The code."}},
        "required": ["code"],
    },
}


class PythonProcess(Killable):
    """The trainer's handle of such a process; a message is (code, most characters of the answer), an answer is (text,
    reason), as `sandbox.run` has them."""

    inside = "rethinker.environments.python"
    closed = "the environment is closed"
    variables: ClassVar = {"PYTHONHASHSEED": "0"}  # the order of a set is the same in all runs

    def __init__(self, config: EnvironmentConfig) -> None:
        super().__init__("environment.use=[python]", (config.memory_gb, config.timeout_s), config.memory_gb)
        self._longest = 16 * CHARACTERS_PER_TOKEN * config.max_text_tokens + 2**16  # bytes, with JSON's escapes

    def _received(self) -> Any:
        try:
            text, reason = json.loads(self._link.recv_bytes(self._longest))
        except (ValueError, TypeError, RecursionError) as error:  # not what `serve` writes
            raise OSError from error
        return str(text), str(reason)


def serve(fd: int) -> None:
    """Answer calls until the trainer closes the connection or dies."""
    link = Connection(fd)
    timeout_s = prepared(link, _prepare)
    if timeout_s is not None:
        answer_all(link, _answer, lambda message: timeout_s, link.send_bytes)


def _answer(message: tuple[str, int]) -> bytes:
    text, reason = run(*message)
    return json.dumps([whole(text), reason]).encode()


def _prepare(opening: tuple[float, float]) -> float:
    memory_gb, timeout_s = opening
    warnings.simplefilter("ignore")  # they would be written with the line of a file
    run("import math; sorted({'é': math.pi, '\\N{DEGREE SIGN}': 1}, key=str); f'{1.5:>10,.2f}'; x = 1; é = 2", 100)
    wall(memory_gb)
    return timeout_s


def wall(memory_gb: float) -> None:
    """Take from this process, for good, what a computation does not need.

    No descriptor can be opened, so no file and no socket; no process or thread started; no file made longer; no core
    dumped. What it prints goes nowhere. The kernel counts no processes of root's, so root becomes nobody.
    """
    limit_memory(memory_gb)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    if os.geteuid() == 0:
        for become in (partial(os.setgroups, []), partial(os.setgid, 65534), partial(os.setuid, 65534)):
            with contextlib.suppress(OSError):  # a container's root may be less than root
                become()
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
