"""Moving bytes: the request's body in, bounded; the answer out, as it comes, until either side ends it.

Speaks ASGI itself, so that each read from upstream is one send; never decodes or retries.
"""

import asyncio
from collections.abc import Awaitable
from types import TracebackType
from typing import Final

from proxy.ends import End
from proxy.errors import BodyTimeout, BodyTooLarge, BodyUnsupported, ClientLeft, Problem
from proxy.forwarding import downstream_headers
from proxy.model import (
    BODY_FOLLOWS,
    Deadlines,
    Exchange,
    FlowRules,
    Headers,
    Inbox,
    Lease,
    Message,
    Receive,
    Send,
    Upstream,
    UpstreamRequest,
)
from proxy.outages import RunDeadline, UpstreamMalformed, require_trust
from proxy.runs import Run, Runs, Spending
from proxy.streams import Stream

MAX_COLLECTED_BYTES: Final = 16 << 20
_UNHEARD: Final = frozenset({End.FIRST_BYTE_DEADLINE, End.IDLE_DEADLINE, End.TOTAL_DEADLINE, End.SHUTDOWN})
"""An invoke that ends so goes on upstream, with nobody to hear its answer."""


async def read_body(headers: Headers, receive: Receive, *, most: int, seconds: float) -> bytes:
    """Read a whole JSON body of at most `most` bytes within `seconds`.

    Raises BodyUnsupported, BodyTooLarge (by its announced length already), BodyTimeout or ClientLeft.
    """
    if _announced_json(headers) > most:
        raise BodyTooLarge(most)
    if isinstance(receive, Inbox) and (body := receive.take_body()) is not None:
        if len(body) > most:
            raise BodyTooLarge(most)
        return body
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


def _announced_json(headers: Headers) -> int:
    """Give the length of the JSON body that is announced, 0 where none is. Raises BodyUnsupported."""
    length = 0
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name == b"content-type":
            media, _, parameters = value.lower().partition(b";")
            charset = parameters.replace(b" ", b"").replace(b'"', b"")
            if media.strip() != b"application/json" or charset not in (b"", b"charset=utf-8"):
                raise BodyUnsupported("Send Content-Type: application/json.")
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise BodyUnsupported("Send the body without a content coding.")
    return length


class ClientPresent:
    """Cancels the body of `with` when the client leaves or time is up: ClientLeft or RunDeadline.

    The request's body must have been read. `seconds` is for the whole of it, so that a client that stops
    reading holds nothing for ever.
    """

    __slots__ = ("_reason", "_receive", "_seconds", "_task", "_timer", "_watcher")

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive = receive
        self._seconds = seconds
        self._reason: ClientLeft | RunDeadline | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  we are in a coroutine of it
        self._task = task
        if isinstance(self._receive, Inbox):
            self._receive.on_leave(self._end_left)
        else:
            self._watcher = loop.create_task(self._watch())
        self._timer = loop.call_later(self._seconds, self._end_late)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        elif isinstance(self._receive, Inbox):
            self._receive.on_leave(None)
        self._timer.cancel()
        if self._reason is not None and self._task.uncancel() == 0 and kind in (None, asyncio.CancelledError):
            raise self._reason

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end_left()

    def _end_left(self) -> None:
        self._end(ClientLeft())

    def _end_late(self) -> None:
        self._end(RunDeadline())

    def _end(self, reason: ClientLeft | RunDeadline) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()


class Relay:
    """Sends requests upstream and their answers down."""

    def __init__(self, upstream: Upstream, runs: Runs, rules: FlowRules) -> None:
        self._upstream = upstream
        self._rules = rules
        self.runs = runs
        """The runs that go on."""

    def relay(
        self,
        request: UpstreamRequest,
        deadlines: Deadlines,
        lease: Lease,
        receive: Receive,
        send: Send,
        *,
        run: Run | None = None,
    ) -> Awaitable[None]:
        """Pass one answer on, each part as it arrives; a run's as `run` has it, any other byte for byte.

        Releases the lease when the exchange upstream is over, which for an invoke may be long after its client has
        left. Raises a Problem; an answer that has begun is then left visibly cut, or its end told in an event.
        """
        if run is not None:
            return self._relay_run(request, deadlines, lease, receive, send, run)
        return self._relay(request, deadlines, lease, receive, send)

    async def _relay(
        self, request: UpstreamRequest, deadlines: Deadlines, lease: Lease, receive: Receive, send: Send
    ) -> None:
        try:
            with ClientPresent(receive, deadlines.total):
                exchange = await self._upstream.start(request, deadlines)
                try:
                    await _pass(exchange, send)
                finally:
                    exchange.abandon()
        finally:
            lease.release()

    async def _relay_run(
        self, request: UpstreamRequest, deadlines: Deadlines, lease: Lease, receive: Receive, send: Send, run: Run
    ) -> None:
        inbox = receive if isinstance(receive, Inbox) else None
        stream = Stream(run, self._rules, send, inbox) if run.wish is not None else None
        exchange: Exchange | None = None
        kept = False
        started = asyncio.get_running_loop().time()
        self.runs.begin(run)
        try:
            with ClientPresent(receive, deadlines.total):
                exchange = await self._upstream.start(request, deadlines)
                del request  # which an open stream need not hold
                await (_pass(exchange, send, run.spending) if stream is None else stream.deliver(exchange))
        except ClientLeft:
            spent = asyncio.get_running_loop().time() - started
            kept = self.runs.leave(run, exchange, lease, seconds=deadlines.total - spent)
            raise
        except (Problem, asyncio.CancelledError) as error:
            end = error.end if isinstance(error, Problem) else End.SHUTDOWN
            if exchange is not None:
                exchange.abandon()
                if end is End.BUDGET or (stream is None and end in _UNHEARD):
                    self.runs.stop(run)
            if stream is not None:
                await stream.conclude(end)
            raise
        finally:
            self.runs.end(run)
            if not kept:
                if exchange is not None:
                    exchange.abandon()
                lease.release()
                run.spending.settle()

    async def collect(self, request: UpstreamRequest, deadlines: Deadlines, receive: Receive) -> tuple[int, bytes]:
        """Read a whole answer of at most 16 MiB: its status and body. Raises a Problem."""
        with ClientPresent(receive, deadlines.total):
            exchange = await self._upstream.start(request, deadlines)
            try:
                await exchange.head()
                require_trust(exchange.status)
                body = bytearray()
                while not exchange.ended:
                    body += await exchange.read()
                    if len(body) > MAX_COLLECTED_BYTES:
                        raise UpstreamMalformed(reason="the answer is too long")
                return exchange.status, bytes(body)
            finally:
                exchange.abandon()


async def _pass(exchange: Exchange, send: Send, spending: Spending | None = None) -> None:
    """Pass an answer on byte for byte."""
    await exchange.head()
    require_trust(exchange.status)
    head = downstream_headers(exchange.headers, status=exchange.status)
    start: Message = {"type": "http.response.start", "status": exchange.status, "headers": head}
    if exchange.has_body:
        start[BODY_FOLLOWS] = True
    await send(start)
    while not exchange.ended:
        body = await exchange.read()
        if spending is not None:
            spending.note(body)
        await send({"type": "http.response.body", "body": body, "more_body": not exchange.ended})
