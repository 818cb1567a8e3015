"""A stand-in for the sidecar, far faster than any proxy: fixed invoke answers, paced or bursting event streams.

Reads only what it needs to answer; never checks who asks. Run as `python -m benchmarks.upstream PORT [SOCKET]`.
"""

import asyncio
import json
import re
import sys
import time
from typing import Final, cast

import uvloop

DEFAULT_EVENTS: Final = 10
MAX_EVENTS: Final = 100_000
DIRECTIVE: Final = re.compile(rb"\[(words|pace) (\d+)(?:ms)?\]")
TIMESTAMP: Final = b',"reasoning":null,"timestamp":'  # the message's; the event's own is its run's, and stays
TIMESTAMP_DIGITS: Final = 17
EPOCH: Final = 1_000_000_000.0  # added to the monotonic clock, so that every timestamp has the same width


def _answer() -> bytes:
    message = {
        "message_id": "msg_76f6a1",
        "role": "assistant",
        "content": [{"type": "text", "text": "The answer that this stub gives to everything. " * 3, "annotations": []}],
        "delta": False,
        "tools_calls": None,
        "metadata": {"node": "MAIN", "model": "stub"},
        "timestamp": 1_700_000_000.5,
        "usages": {"completion_tokens": 31, "prompt_tokens": 12, "total_tokens": 43, "reasoning_tokens": 0},
    }
    meta = {"is_new_thread": False, "thread_id": "t-1"}
    data = {"messages": [message], "state": None, "context": None, "summary": None, "meta": meta}
    body = json.dumps({"data": data, "metadata": {"request_id": "3c7f1a52", "message": "Success"}}).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


INVOKE: Final = _answer()
PING: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n" + b'{"data":"pong"}'
MISSING: Final = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache, no-transform\r\n"
    b"x-accel-buffering: no\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT_HEAD: Final = (
    b'{"event":"message","message":{"message_id":"5bf3e2cb-7ade-4edd-9975-ec9c3dbf93a3","role":"assistant",'
    b'"content":[{"type":"text","text":"word ","annotations":[]}],"delta":true,"tools_calls":null'
) + TIMESTAMP
EVENT_TAIL: Final = (
    b',"metadata":{},"usages":null,"raw":null,"parsed_content":null},"state":null,'
    b'"data":null,"thread_id":"3ae3c1d2-0000-4000-8000-000000000000",'
    b'"run_id":"8822aa10-0000-4000-8000-000000000000","metadata":{"node":"MAIN","thread_id":"t-1"},'
    b'"timestamp":1700000000.079375}\n\r\n'
)
CHUNK_SIZE: Final = b"%x\r\n" % (len(EVENT_HEAD) + TIMESTAMP_DIGITS + len(EVENT_TAIL) - 2)


def make_event() -> bytes:
    """Write one event as one chunk, stamped with the moment of writing."""
    stamp = f"{time.monotonic() + EPOCH:.6f}".encode()
    return CHUNK_SIZE + EVENT_HEAD + stamp + EVENT_TAIL


def read_directives(body: bytes) -> tuple[int, float]:
    """Find how many events the caller wants, and the seconds between two of them."""
    wishes = {name: int(value) for name, value in DIRECTIVE.findall(body)}
    return min(wishes.get(b"words", DEFAULT_EVENTS), MAX_EVENTS), wishes.get(b"pace", 0) / 1000


def measure_request(data: bytes) -> tuple[int, int]:
    """Give where the body begins and where the request ends in `data`; (0, 0) while it is incomplete."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return 0, 0
    head = data[:end].lower()
    where = head.find(b"content-length:")
    if where >= 0:
        length = int(head[where + 15 : head.index(b"\r\n", where)])
        return (end, end + length) if len(data) >= end + length else (0, 0)
    if b"transfer-encoding: chunked" not in head:
        return end, end
    last = data.find(b"0\r\n\r\n", end)
    return (end, last + 5) if last >= 0 else (0, 0)


class Stub(asyncio.Protocol):
    """One connection from a proxy; answers one request at a time."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.left = 0
        self.pace = 0.0
        self.due = 0.0
        self.timer: asyncio.Handle | None = None
        self.streaming = False
        self.writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the protocol's signature
        """Stop a running stream."""
        self.transport = None
        if self.timer is not None:
            self.timer.cancel()

    def pause_writing(self) -> None:
        """Hold a burst while the proxy does not read."""
        self.writable = False

    def resume_writing(self) -> None:
        """Go on with a held burst."""
        self.writable = True
        if self.streaming and not self.pace:
            self._send_event()

    def data_received(self, data: bytes) -> None:
        """Answer every whole request in what has arrived."""
        self.buffer = data = self.buffer + data if self.buffer else data
        while data and not self.streaming:
            body, end = measure_request(data)
            if not end:
                return
            self._answer(data, body, end)
            self.buffer = data = data[end:]

    def _answer(self, data: bytes, body: int, end: int) -> None:
        if self.transport is None:
            return
        if data.startswith(b"POST /v1/graph/invoke"):
            self.transport.write(INVOKE)
        elif data.startswith(b"POST /v1/graph/stream"):
            self.left, self.pace = read_directives(data[body:end])
            self.streaming = True
            self.due = self.loop.time()
            self.transport.write(STREAM_HEAD)
            self._send_event()
        else:
            self.transport.write(PING if data.startswith(b"GET /ping") else MISSING)

    def _send_event(self) -> None:
        if self.transport is None or not self.writable:
            return
        if not self.left:
            self.streaming = False
            self.transport.write(b"0\r\n\r\n")
            self.data_received(b"")
            return
        self.left -= 1
        self.transport.write(make_event())
        if self.pace:
            self.due += self.pace
            self.timer = self.loop.call_at(self.due, self._send_event)
        else:
            self.timer = self.loop.call_soon(self._send_event)


async def serve(port: int, path: str | None = None) -> None:
    """Listen on 127.0.0.1, and on the Unix socket `path` too, until the process is stopped."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Stub, "127.0.0.1", port, backlog=4096)]  # held: uvloop closes what nobody holds
    if path is not None:
        servers.append(await loop.create_unix_server(Stub, path, backlog=4096))
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), *sys.argv[2:3]))
