"""A stand-in for a model provider: speaks the OpenAI chat-completions protocol on a port of its own.

It never decides anything: it repeats what the user said, or calls `add` when the user asks it to.
"""

import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@dataclass(frozen=True, slots=True)
class Provider:
    """A running stand-in; clear `gate` to hold every stream after its first delta until it is set again.

    `abandoned` is set once a client has left a stream that was held.
    """

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)


@contextmanager
def stand_in() -> Iterator[Provider]:
    """Serve until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.provider = Provider(url=f"http://127.0.0.1:{server.server_port}/v1")
    server.provider.gate.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.provider
    finally:
        server.provider.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    provider: Provider
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        provider = cast("_Server", self.server).provider
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        provider.requests.append(asked)
        provider.keys.append(self.headers["authorization"])
        if asked.get("stream"):
            self._stream(asked, provider)
        else:
            self._complete(asked)

    def log_message(self, *_: object) -> None:
        """Stay silent; the tests read `requests`."""

    def _complete(self, asked: dict[str, Any]) -> None:
        answer = _answer(asked)
        reason = "tool_calls" if "tool_calls" in answer else "stop"
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": None, **answer},
            "finish_reason": reason,
        }
        body = json.dumps({**_envelope(asked, "chat.completion"), "choices": [choice], "usage": USAGE}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, asked: dict[str, Any], provider: Provider) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for delta in _deltas(_answer(asked)):
            self._send_chunk(asked, delta, None)
            while not provider.gate.wait(timeout=0.02):
                if self._client_left():
                    provider.abandoned.set()
                    self.close_connection = True
                    return
        self._send_chunk(asked, {}, "stop")
        self._send(b"data: [DONE]\n\n")
        self._send(b"")

    def _client_left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send_chunk(self, asked: dict[str, Any], delta: dict[str, Any], reason: str | None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        chunk = {**_envelope(asked, "chat.completion.chunk"), "choices": [choice]}
        self._send(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _send(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _envelope(asked: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{len(asked['messages'])}", "object": kind, "created": 1, "model": asked["model"]}


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    last = asked["messages"][-1]
    if last["role"] == "tool":
        return {"content": f"The tool said {last['content']}"}
    text = last["content"] if isinstance(last["content"], str) else last["content"][0]["text"]
    match text.split():
        case ["add", a, b] if asked.get("tools"):
            function = {"name": "add", "arguments": json.dumps({"a": int(a), "b": int(b)})}
            return {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}
    return {"content": f"I heard {text}"}


def _deltas(answer: dict[str, Any]) -> list[dict[str, Any]]:
    if "tool_calls" in answer:
        return [{"role": "assistant", **answer}]
    words = answer["content"].split(" ")
    return [{"role": "assistant", "content": word + " "} for word in words[:-1]] + [{"content": words[-1]}]
