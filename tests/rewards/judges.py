"""A judge's server that can be made to fail: HTTP/1.1 in a thread, scripted by a function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """What it was asked, and what each request gets: `script(handler, body, n)`, n being the request's number.

    Attributes:
        served: the models that it lists.
        bodies: of chat requests, in the order of their arrival.
        over: set when the server stops; a script that waits, waits for it.
        most: chat requests that were under way at once, at most.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Callable[[Handler, dict[str, Any], int], None], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.bodies, self.over = script, [], threading.Event()
        self.served: list[str] | None = ["referee", "other"]
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of the server's faults."""


class Handler(BaseHTTPRequestHandler):
    """One connection; `say` and `score` answer."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        named = [{"id": name, "object": "model"} for name in self.server.served or ()]
        self.say({"object": "list", "data": named}, 200 if named else 404)

    def do_POST(self) -> None:
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            server.script(self, body, number)
        finally:
            with server.lock:
                server.now -= 1

    def say(self, body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def score(self, text: Any, finish: str = "stop") -> None:
        message = {"role": "assistant", "content": text}
        self.say({"id": "1", "object": "chat.completion", "choices": [{"message": message, "finish_reason": finish}]})

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving(script: Callable[[Handler, dict[str, Any], int], None], port: int = 0) -> Iterator[Server]:
    """Such a server, until the block ends."""
    with Server(script, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
