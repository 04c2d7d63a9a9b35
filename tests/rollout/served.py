"""One of vLLM's own servers, as `rethinker serve` starts them, for a module's tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress

from rethinker.rollout.server import serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """A model folder and the server that serves it; started when it is needed, and again after a test has killed it."""

    def __init__(self, folder, log, config):
        self.folder, self.log, self.config = str(folder), log, config
        self.process = None

    def address(self) -> str:
        if self.process is None or self.process.poll() is not None:
            port = free_port()
            line, variables = serve.command(self.config, self.folder, "127.0.0.1", port, gpu=False)
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    line, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True
                )
            self._address = f"http://127.0.0.1:{port}"
            end = time.monotonic() + 300
            while not self._is_up():
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-4000:]
                time.sleep(0.25)
        return self._address

    def _is_up(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self._address}/health", timeout=5).status == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
