"""Moving bytes: the request's body in, bounded; the answer out, as it comes, until either side ends it.

Speaks ASGI itself, so that each read from upstream is one send; never decodes, holds back or retries.
"""

import asyncio
from types import TracebackType
from typing import Final, Self

from proxy.errors import BodyTimeout, BodyTooLarge, BodyUnsupported, ClientLeft
from proxy.forwarding import downstream_headers
from proxy.model import Deadlines, Exchange, Headers, Receive, Send, Upstream, UpstreamRequest
from proxy.outages import RunDeadline, UpstreamDistrust, UpstreamMalformed

MAX_COLLECTED_BYTES: Final = 16 << 20


async def read_body(headers: Headers, receive: Receive, *, most: int, seconds: float) -> bytes:
    """Read a whole JSON body of at most `most` bytes within `seconds`.

    Raises BodyUnsupported, BodyTooLarge (by its announced length already), BodyTimeout or ClientLeft.
    """
    _require_json(headers)
    announced = next((value for name, value in headers if name == b"content-length"), b"0")
    if int(announced) > most:
        raise BodyTooLarge(most)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > most:
                    raise BodyTooLarge(most)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError as error:
        raise BodyTimeout from error


def _require_json(headers: Headers) -> None:
    for name, value in headers:
        if name == b"content-type":
            media, _, parameters = value.lower().partition(b";")
            charset = parameters.replace(b" ", b"").replace(b'"', b"")
            if media.strip() != b"application/json" or charset not in (b"", b"charset=utf-8"):
                raise BodyUnsupported("Send Content-Type: application/json.")
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise BodyUnsupported("Send the body without a content coding.")


class ClientPresent:
    """Cancels the body of `async with` when the client leaves or time is up: ClientLeft or RunDeadline.

    The request's body must have been read. `seconds` is for the whole of it, so that a client that stops
    reading holds nothing for ever.
    """

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive = receive
        self._seconds = seconds
        self._reason: ClientLeft | RunDeadline | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  we are in a coroutine of it
        self._task = task
        self._watcher = loop.create_task(self._watch())
        self._timer = loop.call_later(self._seconds, self._end, RunDeadline())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        self._timer.cancel()
        if self._reason is not None and self._task.uncancel() == 0 and kind in (None, asyncio.CancelledError):
            raise self._reason

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end(ClientLeft())

    def _end(self, reason: ClientLeft | RunDeadline) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()


class Relay:
    """Sends requests upstream and their answers down."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def relay(self, request: UpstreamRequest, deadlines: Deadlines, receive: Receive, send: Send) -> None:
        """Pass one answer on, byte for byte, each part as it arrives.

        Raises a Problem; after the answer has begun this leaves it visibly cut, never ended.
        """
        async with ClientPresent(receive, deadlines.total):
            exchange = await self._upstream.begin(request, deadlines)
            try:
                _require_trust(exchange)
                await send(
                    {
                        "type": "http.response.start",
                        "status": exchange.status,
                        "headers": downstream_headers(exchange.headers),
                    }
                )
                while not exchange.ended:
                    body = await exchange.read()
                    await send({"type": "http.response.body", "body": body, "more_body": not exchange.ended})
            finally:
                exchange.abandon(ClientLeft())

    async def collect(self, request: UpstreamRequest, deadlines: Deadlines, receive: Receive) -> tuple[int, bytes]:
        """Read a whole answer of at most 16 MiB: its status and body. Raises a Problem."""
        async with ClientPresent(receive, deadlines.total):
            exchange = await self._upstream.begin(request, deadlines)
            try:
                _require_trust(exchange)
                body = bytearray()
                while not exchange.ended:
                    body += await exchange.read()
                    if len(body) > MAX_COLLECTED_BYTES:
                        raise UpstreamMalformed(reason="the answer is too long")
                return exchange.status, bytes(body)
            finally:
                exchange.abandon(ClientLeft())


def _require_trust(exchange: Exchange) -> None:
    if exchange.status == 401:  # noqa: PLR2004  Unauthorized: that is about our token, not the caller's
        raise UpstreamDistrust
