"""Requests and answers as bytes on a socket, for what a well-behaved client would never write.

It normalises nothing: what a test wrote is what is sent, and what an upstream was sent is kept as it came.
"""

import http.client
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pydantic_core

TIMEOUT = 5.0
"""Seconds after which an answer that does not come is one that never will."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its status, its fields in order with duplicates, its body."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        """Give every value of a field."""
        return [value for field_name, value in self.fields if field_name.lower() == name]

    def problem(self) -> dict[str, Any]:
        """Read the body as an RFC 9457 problem."""
        assert self.values("content-type") == ["application/problem+json"], (self.status, self.body)
        problem: dict[str, Any] = pydantic_core.from_json(self.body)
        return problem


@contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    """Connect to the server at `url`; the connection is reset at the end, whatever was left on it."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=TIMEOUT) as connected:
        yield connected


def head(method: str, target: str, *fields: tuple[str, str | bytes]) -> bytes:
    """Write a request's head as it stands, Host included, nothing else added."""
    lines = [f"{method} {target} HTTP/1.1\r\nHost: proxy.test\r\n".encode()]
    lines += [name.encode() + b": " + (v if isinstance(v, bytes) else v.encode()) + b"\r\n" for name, v in fields]
    return b"".join([*lines, b"\r\n"])


def exchange(url: str, request: bytes) -> Answer:
    """Send these bytes and no others, and read one answer; an informational one counts as the answer."""
    with connection(url) as connected:
        connected.sendall(request)
        return read_answer(connected, request.partition(b" ")[0].decode("latin-1"))


def read_answer(connected: socket.socket, method: str = "GET") -> Answer:
    """Read one answer to a request with `method`."""
    response = http.client.HTTPResponse(connected, method=method)
    response.begin()
    return Answer(response.status, response.getheaders(), response.read())


@dataclass(slots=True)
class Stub:
    """An upstream that keeps each request as it came."""

    url: str = ""
    requests: list[bytes] = field(default_factory=list)


@contextmanager
def stub_upstream(respond: Callable[[bytes], bytes]) -> Iterator[Stub]:
    """Answer each request with the bytes that `respond` makes of it; an answer without a length ends the connection."""
    stub = Stub()

    class Conversation(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while request := self._read():
                stub.requests.append(request)
                answer = respond(request)
                self.wfile.write(answer)
                if b"connection: close" in answer.lower():
                    return

        def _read(self) -> bytes:
            lines = []
            while line := self.rfile.readline():
                lines.append(line)
                if line == b"\r\n":
                    break
            lengths = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")]
            return b"".join(lines) + self.rfile.read(sum(lengths))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """Do nothing: a peer that resets is no error of ours."""

    with Server(("127.0.0.1", 0), Conversation) as server:
        host, port = server.server_address[:2]
        stub.url = f"http://{host!s}:{port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield stub
        finally:
            server.shutdown()


def json_answer(body: bytes, status: str = "200 OK", *fields: bytes) -> bytes:
    """Write an answer with a JSON body."""
    lines = [f"HTTP/1.1 {status}\r\n".encode(), b"content-type: application/json\r\n"]
    lines += [one + b"\r\n" for one in fields]
    return b"".join([*lines, b"content-length: %d\r\n\r\n" % len(body), body])
