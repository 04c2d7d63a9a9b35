"""A judge's server that can be made to fail: HTTP/1.1 in a thread, scripted by a function."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        self.lock, self.connections = threading.Lock(), set[socket.socket]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of the server's faults."""


class Handler(BaseHTTPRequestHandler):
    """One connection; `say` and `score` answer."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

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
            for connection in server.connections:  # a client keeps them for its next request
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def cut(handler, body, number):
    """The connection ends in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def endless(handler, body, number):
    """A body without an end, a byte every now and then."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b" ")


def slow(handler, body, number):
    """No answer while the server runs."""
    handler.server.over.wait()


_NO_SCORE = "the judge's last line is no `Score: X`: let prompt ask for it"
_NO_COMPLETION = "answers no chat completion: is it an OpenAI-style API?"
FAULTS = {
    "slow": (slow, "timeout", "reward.functions[0].timeout_s=2.0"),
    "endless": (endless, "timeout", "reward.functions[0].timeout_s=2.0"),
    "no number": (
        lambda handler, body, number: handler.score(f"Quite good, {number}."),
        "error",
        f"{_NO_SCORE}; 'Quite good, ",
    ),
    "a word": (lambda handler, *_: handler.score("Score: one"), "error", _NO_SCORE),
    "json": (lambda handler, *_: handler.score('{"score": "high"}'), "error", _NO_SCORE),
    "not a number": (lambda handler, *_: handler.score("Score: NaN"), "error", _NO_SCORE),
    "too much": (lambda handler, *_: handler.score("Score: 7"), "error", "outside of scale=[0, 1]"),
    "empty": (lambda handler, *_: handler.score(""), "error", "the judge wrote no text: raise max_new_tokens"),
    "cut short": (lambda handler, *_: handler.score("Score: 1", "length"), "error", "cut off: raise max_new_tokens"),
    "no choices": (lambda handler, *_: handler.say({"choices": []}), "error", _NO_COMPLETION),
    "html": (lambda handler, *_: handler.say("<html>Score: 1", kind="text/html"), "error", _NO_COMPLETION),
    "no json": (lambda handler, *_: handler.say("Score: 1"), "error", "answers what is no JSON"),
    "refused": (lambda handler, *_: handler.say({"error": {"message": "no"}}, 400), "error", "set pass_images: false"),
    "busy": (lambda handler, *_: handler.say({}, 429), "error", "asked too often: lower concurrency"),
    "broken": (lambda handler, *_: handler.say("oops", 500), "error", "fails: its own log says why (status 500)"),
    "hangs up": (cut, "error", "cannot be reached: start the judge there"),
}
"""Of each fault: the script, how it is counted, and what the log says to do."""
