"""One of vLLM's own servers, as `rethinker serve` starts them, for a module's tests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
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


class Relay:
    """Another address of the same server, which is cut off at its request number `last`: all connections break, and new
    ones are refused."""

    def __init__(self, address: str):
        self.port = int(address.rpartition(":")[2])
        self.requests, self.last = 0, None
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader, writer):
        behind, before = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers += [writer, before]
        self.requests += 1
        if self.requests == self.last:
            self._close()

        async def pump(source, sink):
            try:
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
                sink.write_eof()
            except OSError:
                pass

        await asyncio.gather(pump(reader, before), pump(behind, writer))
        writer.close(), before.close()

    def _close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
