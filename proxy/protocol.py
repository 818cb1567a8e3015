"""HTTP/1.1 and WebSockets towards the client, as uvicorn speaks them, less what a proxy must not take on.

That is pipelining, bodies behind an upgrade, and upgrades of what is no WebSocket here. Knows nothing of what requests
mean.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from functools import cache, lru_cache
from typing import Any, Final, cast, override

import pydantic_core
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers as Fields
from websockets.frames import Frame
from websockets.http11 import MAX_LINE_LENGTH, MAX_NUM_HEADERS, Request
from websockets.server import ServerProtocol

from proxy.model import DRAIN, App, Headers, Inbox, Message, Receive, Scope, Send
from proxy.operations import OPERATIONS, Kind
from proxy.outbox import Outbox
from proxy.partings import Leaving, end_idle
from proxy.signals import Flow, Signal

_WEBSOCKETS: Final = frozenset(row.path for row in OPERATIONS if row.kind is Kind.DUPLEX)
_SWITCHING: Final = 101
_AROUND: Final = 16
"""Bytes of a line beside a field's name and value, or beside the target."""
_ANNOUNCE_A_BODY: Final = frozenset({b"content-length", b"transfer-encoding"})


class RefusedError(Exception):
    """Raised inside the parser to stop it; uvicorn then calls `send_400_response`."""


class CycleInbox(Inbox):
    """What a client sends in one request. The task and the timer that it spares cost 60 k instructions a request."""

    __slots__ = ("_cycle", "_left")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._left: Callable[[], None] | None = None

    @override
    def __call__(self) -> Awaitable[Message]:
        return cast("Receive", self._cycle.receive)()

    @override
    def take_body(self) -> bytes | None:
        cycle = self._cycle
        if cycle.more_body or not cycle.body or cycle.disconnected or cycle.waiting_for_100_continue:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        cycle.message_event = cast("asyncio.Event", Signal())
        return body

    @override
    def on_leave(self, left: Callable[[], None] | None) -> None:
        self._left = left
        if left is None:
            return
        if self._cycle.disconnected:
            asyncio.get_running_loop().call_soon(self.tell_left)
        else:
            self._cycle.flow.resume_reading()  # a long body pauses it, and who does not read hears nobody leave

    @property
    @override
    def is_writable(self) -> bool:
        return not self._cycle.flow.write_paused

    def tell_left(self) -> None:
        """Take in that the connection is lost, before its answer was complete or after."""
        left, self._left = self._left, None
        if left is not None and self._cycle.disconnected:
            left()


@cache
def _no_pipeline() -> deque[Any]:
    """Give the pipeline of every connection, since none has one; a deque of its own would take 760 bytes of each."""
    return deque()


@lru_cache(1)
def _done(loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """Give what every answer of this loop awaits when there is nothing to wait for."""
    future: asyncio.Future[None] = loop.create_future()
    future.set_result(None)
    return future


class OneAtATime(Leaving, HttpToolsProtocol):
    """One request on a connection at a time.

    uvicorn queues pipelined requests without bound, and tells only the newest of them that the client left; and
    it takes the body of a request that offers an upgrade for the next request. Neither is something we need.
    """

    # uvicorn's attributes too: there are more than 30, and a dict of so many takes 1,600 bytes of every connection.
    __slots__ = (
        "_inbox", "_kept_since", "_note_refusal", "access_log", "access_logger", "app", "app_state", "asgi_version",
        "client", "config", "connections", "cycle", "expect_100_continue", "flow", "headers", "limit_concurrency",
        "logger", "loop", "parser", "pipeline", "root_path", "scheme", "scope", "server", "server_state", "tasks",
        "timeout_keep_alive", "timeout_keep_alive_task", "transport", "url", "ws_protocol_class",
    )  # fmt: skip

    def __init__(self, *args: Any, note_refusal: Callable[..., None] | None = None, **options: Any) -> None:  # noqa: ANN401  uvicorn's
        super().__init__(*args, **options)
        self._note_refusal = note_refusal
        self._inbox: CycleInbox | None = None
        self._kept_since = math.inf
        self.pipeline = _no_pipeline()

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.flow = Flow(transport)
        self._wait_for_a_head()

    @override
    def on_message_begin(self) -> None:
        if self._is_answering():
            raise RefusedError("pipelined")
        self._kept_since = self.loop.time()
        super().on_message_begin()

    @override
    def on_headers_complete(self) -> None:
        hosts = [name for name, _ in self.headers].count(b"host")
        if hosts != 1 and (hosts or self.parser.get_http_version() != "1.0"):  # RFC 9112 §3.2
            raise RefusedError("not one Host")
        self._kept_since = math.inf
        if self.parser.should_upgrade():
            if any(name in _ANNOUNCE_A_BODY for name, _ in self.headers):
                raise RefusedError("a body behind an upgrade")
            super().on_headers_complete()
        else:
            super().on_headers_complete()
            self.headers = []  # for trailers, no header fields (RFC 9110 §6.5.1); the scope keeps its own

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        inbox = self._inbox = CycleInbox(cycle)
        outbox = Outbox(cycle, _done(self.loop))

        def with_ours(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # noqa: ARG001  ours instead
            return cast("App", app)(scope, inbox, outbox)

        super()._start_asgi_task(cycle, with_ours)  # type: ignore[arg-type]  # uvicorn's types name every message

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self._inbox is not None:
            self._inbox.tell_left()

    @override
    def eof_received(self) -> None:
        """Take in at once that the client has left: the connection is lost only when it has read what was written."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self._inbox is not None:
                self._inbox.tell_left()

    # The timer of a connection goes on from one request to the next: to set one anew for each costs more.

    @override
    def _unset_keepalive_if_required(self) -> None:
        """Let it run: bytes may be the rest of a body that was answered unread, which nothing else would bound."""

    @override
    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self._wait_for_a_head()

    @override
    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        due = self._kept_since + self.timeout_keep_alive
        if self.loop.time() >= due:
            self.transport.close()
        elif due < math.inf:  # else a request is here, whose answer's end sets the timer
            self._look_at(due)

    def _wait_for_a_head(self) -> None:
        """Wait as long for the beginning of a request as, once more, for the end of its head."""
        self._kept_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_at(self._kept_since + self.timeout_keep_alive)

    def _look_at(self, due: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(due, self.timeout_keep_alive_handler)

    @override
    def _should_upgrade(self) -> bool:
        """Upgrade a WebSocket's path, when it is asked for as RFC 6455 §4.2.1 says; the rest stays a request."""
        if self.url.partition(b"?")[0].decode("latin-1") not in _WEBSOCKETS or self.scope["method"] != "GET":
            return False
        return (
            self.scope["http_version"] == "1.1"
            and super()._should_upgrade()
            and opens_a_websocket(self.url, self.headers)
        )

    @override
    def send_400_response(self, msg: str) -> None:
        """Answer what is no request of ours with a problem; in the middle of an answer, cut that instead."""
        if self._is_answering():
            self.transport.abort()
            return
        problem = {"type": "about:blank", "title": "Not an HTTP request that is served here", "status": 400}
        body = pydantic_core.to_json(problem | {"detail": msg, "code": "invalid_request"})
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
        if self._note_refusal is not None:
            self._note_refusal(self.client, reason=msg, sent=len(body))

    def announce_close(self) -> None:
        """Have the answer that is being made say that it is the last, if it has not begun."""
        if self._is_answering() and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def close_idle(self) -> None:
        """End the connection if it is between two requests."""
        if not self._is_answering():
            end_idle(self.transport)

    @override
    def shutdown(self) -> None:
        self.close_idle()
        if self._is_answering():
            self.cycle.keep_alive = False

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


def opens_a_websocket(target: bytes, headers: Headers) -> bool:
    """Say whether the server of WebSockets takes this request: what it refuses is answered as a request instead.

    It answers some of what it refuses with nothing at all, and nobody would hear of any.
    """
    if len(headers) > MAX_NUM_HEADERS or len(target) + _AROUND > MAX_LINE_LENGTH:
        return False
    if any(len(name) + len(value) + _AROUND > MAX_LINE_LENGTH for name, value in headers):
        return False
    fields = Fields([(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers])
    return ServerProtocol().accept(Request(target.decode("latin-1"), fields)).status_code == _SWITCHING


class Conversation(Leaving, WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, which tells the application that the process is to end rather than closing at once.

    Pongs are held only for a client that reads, and of a message that comes in parts their bytes alone: the parts may
    be endless, and empty.
    """

    _begun = bytearray()

    def _pong(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # dropped: RFC 6455 §5.5.3 lets a pong stand for the pings before it

    def _go_on(self, event: Frame) -> None:
        if self.frames:
            self._begun = bytearray(self.frames.pop())
        self._begun += event.data
        if event.fin:
            self.frames = [bytes(self._begun)]
            self._begun = bytearray()
            self.send_receive_event_to_app()

    # uvicorn's own names
    handle_ping = _pong
    handle_cont = _go_on

    @override
    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and not self.disconnected:
            self.queue.put_nowait({"type": DRAIN})  # type: ignore[arg-type,misc]  # a message of our own
        else:
            super().shutdown()
