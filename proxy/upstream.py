"""A small HTTP/1.1 client for one origin: kept-alive connections, one exchange at a time on each.

Never retries, follows or decodes; a connection that sent a byte too many is never used again.
"""

import asyncio
import select
from collections import deque
from collections.abc import Callable
from typing import Final, cast

from proxy.answers import Answer
from proxy.errors import ClientLeft
from proxy.forwarding import encode_request
from proxy.model import Deadlines, Headers, Outlet, UpstreamRequest
from proxy.origin import Origin
from proxy.outages import PoolExhausted, UpstreamCut, UpstreamDeadline, UpstreamProblem

MAX_WAITING_BYTES: Final = 65_536
"""Upstream is paused while this much of a body waits for the client."""
_FAILED: Final = 500


class Connection(asyncio.Protocol):
    """One connection to the sidecar and the exchange that is on it, if any."""

    def __init__(self, release: Callable[["Connection"], None]) -> None:
        self._release = release
        self._transport: asyncio.Transport | None = None
        self._poll = select.poll()
        self._exchange: PooledExchange | None = None
        self.idle_since = 0.0

    def is_clean(self) -> bool:
        """Say whether an exchange can begin: open, idle, and not a byte or an end waiting in the kernel."""
        return self._transport is not None and self._exchange is None and not self._poll.poll(0)

    def begin(self, head: bytes, deadlines: Deadlines) -> "PooledExchange":
        """Write a request and give the exchange that it opens."""
        self._exchange = exchange = PooledExchange(self, deadlines)
        if self._transport is None:
            exchange.fail(UpstreamCut(reason="closed before the request"))
        else:
            self._transport.write(head)
        return exchange

    def end(self, *, reusable: bool) -> None:
        """Part from the exchange, and go back to the pool."""
        self._exchange = None
        if not reusable:
            self.close()
        self._release(self)

    def close(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    @property
    def is_open(self) -> bool:
        """Whether bytes can still be exchanged."""
        return self._transport is not None

    def hold_back(self, *, held: bool) -> None:
        """Read no more, so that the sidecar is held back; or read on."""
        if self._transport is not None:
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its class
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self.close()  # bytes that nobody asked for
        else:
            self._exchange.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._exchange is not None:
            self._exchange.cut(type(exc).__name__ if exc is not None else "end of file")


class PooledExchange:
    """One request's answer, from its first byte to its last. Implements `model.Exchange`."""

    def __init__(self, connection: Connection, deadlines: Deadlines) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = connection
        self._deadlines = deadlines
        self._answer = Answer()
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._outlet: Outlet | None = None
        self._paused = False
        self.ended = False
        """See `model.Exchange.ended`."""
        self.active = self._loop.time()
        """See `model.Exchange.active`."""
        self._head_due = self.active + deadlines.first_byte
        self._timer = self._loop.call_later(min(deadlines.first_byte, deadlines.idle), self._check_deadlines)

    @property
    def status(self) -> int:
        """See `model.Exchange.status`."""
        return self._answer.status

    @property
    def headers(self) -> Headers:
        """See `model.Exchange.headers`."""
        return self._answer.headers

    @property
    def has_body(self) -> bool:
        """See `model.Exchange.has_body`."""
        return self._answer.waiting > 0 or self._answer.complete

    async def head(self) -> bool:
        """See `model.Exchange.head`."""
        while not self._answer.begun:
            if not await self._more():
                return False
        return True

    async def read(self, outlet: Outlet | None = None) -> bytes:
        """See `model.Exchange.read`."""
        answer = self._answer
        while not answer.waiting and not answer.complete:
            if not await self._more(outlet):
                return b""
        if answer.complete:
            self.ended = True
            # A server that failed may close without having said so: uvicorn does, after an unhandled exception.
            self._part(reusable=answer.persistent and not answer.surplus and answer.status < _FAILED)
        elif self._paused and self._connection is not None:
            self._paused = False
            self._connection.hold_back(held=False)
        self.active = self._loop.time()
        return answer.take()

    def abandon(self) -> None:
        """See `model.Exchange.abandon`."""
        if self._connection is not None:
            self.fail(ClientLeft())

    def nudge(self) -> None:
        """See `model.Exchange.nudge`."""
        self._wake(more=False)

    # What the connection calls.

    def feed(self, data: bytes) -> None:
        """Take in what arrived."""
        self.active = self._loop.time()
        answer, waiter = self._answer, self._waiter
        is_much = len(data) > MAX_WAITING_BYTES
        outlet = self._outlet if waiter is not None and not waiter.done() and not is_much else None
        try:
            answer.feed(data)
            if outlet is not None and answer.waiting and not answer.complete and outlet.is_open:
                outlet.pass_on(answer.take())
                return
        except Exception as error:  # noqa: BLE001  it is raised where the bytes are waited for
            self.fail(error)
            return
        # uvloop reads 8 MB in one turn of the loop while each read fills its buffer; others have their turn after one.
        if answer.waiting > (0 if is_much else MAX_WAITING_BYTES) and not self._paused and self._connection is not None:
            self._paused = True
            self._connection.hold_back(held=True)
        self._wake()

    def cut(self, reason: str) -> None:
        """Take in that the connection ended."""
        if self._answer.complete:
            self._answer.persistent = False
        else:
            self.fail(UpstreamCut(reason=reason))

    def fail(self, reason: Exception) -> None:
        """End the exchange with an error; bytes that arrived before it can still be read."""
        if self._failure is None:
            self._failure = reason
        self._part(reusable=False)
        self._wake()

    # Inside.

    def _more(self, outlet: Outlet | None = None) -> asyncio.Future[bool]:
        if self._failure is not None:
            raise self._failure
        self._outlet = outlet
        self._waiter = self._loop.create_future()
        return self._waiter

    def _wake(self, *, more: bool = True) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(more)

    def _part(self, *, reusable: bool) -> None:
        self._timer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._paused:
                connection.hold_back(held=False)
            connection.end(reusable=reusable)

    def _check_deadlines(self) -> None:
        now, answer = self._loop.time(), self._answer
        due = self._head_due  # however much of a head has come
        if answer.begun:  # While bytes wait for the client, it is the client who is slow, not upstream.
            due = (now if answer.waiting else self.active) + self._deadlines.idle
        if now >= due:
            self.fail(UpstreamDeadline(reason="idle" if answer.begun else "first byte"))
        else:  # by the next look the head may be there, and nothing after it
            self._timer = self._loop.call_at(min(due, now + self._deadlines.idle), self._check_deadlines)


class Pool:
    """Connections to one origin, the last used first. Implements `model.Upstream`."""

    def __init__(self, url: str, *, most: int, most_idle: int, idle_seconds: float) -> None:
        self._origin = Origin.of(url)
        self._authority = self._origin.authority.encode()
        self._most = most
        self._most_idle = most_idle
        self._idle_seconds = idle_seconds
        self.idle = self._idle = deque[Connection]()
        """Those kept for the next request."""
        self._sweeping = False
        self.open = 0
        """Connections that are open or being opened."""

    async def start(self, request: UpstreamRequest, deadlines: Deadlines) -> PooledExchange:
        """See `model.Upstream.start`. Raises UpstreamProblem or PoolExhausted."""
        connection = self._take() or await self._connect(deadlines.connect)
        return connection.begin(encode_request(request, self._authority), deadlines)

    def close(self) -> None:
        """Close idle connections; those in use close when they are done."""
        self._most_idle = 0
        while self._idle:
            self._discard(self._idle.pop())

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_clean() and self._is_fresh(connection):
                return connection
            self._discard(connection)
        return None

    async def _connect(self, seconds: float) -> Connection:
        if self.open >= self._most:
            raise PoolExhausted
        self.open += 1
        try:
            async with asyncio.timeout(seconds):
                _, connection = await self._origin.connect(lambda: Connection(self._give_back))
        except BaseException as error:
            self.open -= 1
            if isinstance(error, TimeoutError):
                raise UpstreamDeadline(reason="connect") from error
            if isinstance(error, OSError):
                raise UpstreamProblem(reason=type(error).__name__) from error
            raise
        return connection

    def _give_back(self, connection: Connection) -> None:
        if not connection.is_open or len(self._idle) >= self._most_idle:
            self._discard(connection)
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if not self._sweeping:
            self._sweeping = True
            loop.call_later(self._idle_seconds, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long: before the sidecar does, lest a request meets its goodbye."""
        while self._idle and not self._is_fresh(self._idle[0]):
            self._discard(self._idle.popleft())
        self._sweeping = bool(self._idle)
        if self._sweeping:
            asyncio.get_running_loop().call_later(self._idle_seconds, self._sweep)

    def _is_fresh(self, connection: Connection) -> bool:
        return asyncio.get_running_loop().time() - connection.idle_since < self._idle_seconds

    def _discard(self, connection: Connection) -> None:
        connection.close()
        self.open -= 1
