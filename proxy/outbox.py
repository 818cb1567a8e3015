"""What goes to the client in answer to one request, written onto uvicorn's connection in as few writes as it takes.

Says what uvicorn's own `send` says (RFC 9112 §6, §7), with its checks. Knows nothing of what answers mean.
"""

import asyncio
from collections.abc import Awaitable
from functools import lru_cache
from typing import Final

from uvicorn.protocols.http.httptools_impl import HEADER_RE, STATUS_LINE, RequestResponseCycle

from proxy.model import BODY_FOLLOWS, Headers, Message

_BODILESS: Final = frozenset({204, 304})
_TEXT: Final = bytes({*range(0x20, 0x7F), *range(0x80, 0x100), 0x09})
"""What may stand in a field's value (RFC 9110 §5.5)."""
_CLOSE: Final = (b"connection: ", b"close", b"\r\n")
_CHUNKED: Final = (b"transfer-encoding: ", b"chunked", b"\r\n")
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"connection"})
_MOST_NAMES: Final = 256
"""Of fields, that need not be looked at again."""


class Outbox:
    """An ASGI `send` for one request. Where the client reads, nothing is awaited and no coroutine made.

    The head waits for the body when it is said that BODY_FOLLOWS at once: a write to a socket costs more than all that
    is in it. Raises RuntimeError for what is no answer, as uvicorn does; the connection is then closed.
    """

    __slots__ = ("_cycle", "_head", "_sent")

    def __init__(self, cycle: RequestResponseCycle, sent: asyncio.Future[None]) -> None:
        self._cycle = cycle
        self._head = b""
        self._sent = sent
        """Something to await that is done."""

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send, as ASGI says."""
        if self._cycle.flow.write_paused and not self._cycle.disconnected:
            return self._send_when_read(message)
        self._send(message)
        return self._sent

    async def _send_when_read(self, message: Message) -> None:
        await self._cycle.flow.drain()
        self._send(message)

    def _send(self, message: Message) -> None:
        cycle = self._cycle
        if cycle.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.body" and cycle.response_started and not cycle.response_complete:
            self._send_body(message.get("body", b""), more=message.get("more_body", False))
        elif kind == "http.response.start" and not cycle.response_started:
            cycle.response_started = True
            cycle.waiting_for_100_continue = False
            head = self._encode_head(message["status"], message.get("headers", []))
            if BODY_FOLLOWS in message:
                self._head = head
            else:
                cycle.transport.write(head)
        else:
            raise RuntimeError(f"unexpected ASGI message: {kind}")

    def _encode_head(self, status: int, headers: Headers) -> bytes:
        cycle = self._cycle
        parts = [STATUS_LINE[status]]
        closes = False
        for given, value in [*cycle.default_headers, *headers]:
            name, frames = _proven(given)
            if frames:
                if name == b"content-length: " and cycle.chunked_encoding is None:
                    cycle.expected_content_length = int(value)
                    cycle.chunked_encoding = False
                elif name == b"transfer-encoding: " and value.lower() == b"chunked":
                    cycle.expected_content_length = 0
                    cycle.chunked_encoding = True
                elif name == b"connection: " and b"close" in value.lower():
                    cycle.keep_alive = False
                    closes = True
            parts += (name, value, b"\r\n")
        if not cycle.keep_alive and not closes:
            parts += _CLOSE
        if cycle.chunked_encoding is None and cycle.scope["method"] != "HEAD" and status not in _BODILESS:
            cycle.chunked_encoding = True
            parts += _CHUNKED
        parts.append(b"\r\n")
        head = b"".join(parts)
        if head.translate(None, _TEXT) != b"\r\n" * (len(parts) // 3 + 2):  # cheaper than to look at each value
            raise RuntimeError("a field's value holds what no field may hold")
        return head

    def _send_body(self, body: bytes, *, more: bool) -> None:
        cycle = self._cycle
        head, self._head = self._head, b""
        if cycle.scope["method"] == "HEAD":
            cycle.expected_content_length = 0
            written = head
        elif cycle.chunked_encoding:
            end = b"" if more else b"0\r\n\r\n"
            written = b"%b%x\r\n%b\r\n%b" % (head, len(body), body, end) if body else head + end
        else:
            cycle.expected_content_length -= len(body)
            if cycle.expected_content_length < 0:
                raise RuntimeError("the body is longer than its Content-Length")
            written = head + body if head else body
        if written:
            cycle.transport.write(written)
        if not more:
            if cycle.expected_content_length != 0:
                raise RuntimeError("the body is shorter than its Content-Length")
            cycle.response_complete = True
            cycle.message_event.set()
            if not cycle.keep_alive:
                cycle.transport.close()
            cycle.on_response()


@lru_cache(_MOST_NAMES)
def _proven(name: bytes) -> tuple[bytes, bool]:
    """Give the beginning of a field's line, and whether the answer's framing is in it."""
    if not name or HEADER_RE.search(name):
        raise RuntimeError(f"no field's name: {name!r}")
    name = name.lower()
    return name + b": ", name in _FRAMING
