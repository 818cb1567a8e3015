"""The outermost room: gives each request its id and Record, turns every error into an answer, tells who watches.

Runs for failed requests too. What is written down of one, and counted, is the watchers' business.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from starlette.exceptions import HTTPException

from proxy.accesslog import shortened
from proxy.ends import End
from proxy.errors import ClientProblem, MethodNotAllowed, NotFound, Problem
from proxy.forwarding import request_id_of
from proxy.logs import place_of
from proxy.model import BODY_FOLLOWS, RECORD, App, Headers, Message, Receive, Record, Scope, Send, Watcher
from proxy.outages import Draining

error_log: Final = logging.getLogger("agentflow_proxy.error")
_LAST_WORDS_SECONDS: Final = 1.0


class Observability:
    """ASGI middleware around everything else. Times come from `clock` (monotonic, seconds).

    Like all rooms that only choose who goes on, it is no coroutine function: what it has chosen is awaited in its
    place, so that an open stream does not hold a frame for it.
    """

    def __init__(
        self,
        app: App,
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        trusted_hops: int,
        watchers: Sequence[Watcher],
    ) -> None:
        self._app = app
        self._clock = clock
        self._new_id = new_id
        self._trusted_hops = trusted_hops
        self._watchers = tuple(watchers)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            return self._observe(scope, receive, send)
        if scope["type"] != "websocket":
            return self._app(scope, receive, send)
        scope["method"] = "GET"  # RFC 6455 §4.1
        return self._observe(scope, receive, _answering_handshakes(send))

    async def _observe(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Headers = scope["headers"]
        request_id = request_id_of(headers) or self._new_id().encode()
        address = client_address(scope["client"], headers, trusted_hops=self._trusted_hops)
        record = scope[RECORD] = Record(request_id, self._clock(), address, scope["method"], scope["path"])
        self._begin(record, headers)

        def observed(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id),
                    *record.answer_fields,
                ]
            elif body := message.get("body") or message.get("text") or message.get("bytes"):
                if record.first_byte_at is None:
                    record.first_byte_at = self._clock()
                record.sent_bytes += len(body)
            elif message["type"] == "websocket.accept":
                record.status = 101
                message["headers"] = [(b"x-request-id", request_id), *record.answer_fields]
            return send(message)

        try:
            await self._app(scope, receive, observed)
        except Problem as problem:
            await self._answer(problem, scope, observed)
        except HTTPException as error:  # what Starlette's router raises
            await self._answer(_problem_of(error), scope, observed)
        except Exception as error:  # noqa: BLE001  the process edge
            fields = {"request_id": request_id.decode(), "error": place_of(error)}
            error_log.error("request.failed", extra={"fields": fields})
            await self._answer(Problem(reason=type(error).__name__), scope, observed)
        except asyncio.CancelledError:  # the grace is over
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_SECONDS):  # a client that does not read is not waited for
                    await self._answer(Draining(reason="the grace is over"), scope, observed)
            record.end = End.SHUTDOWN
            raise
        finally:
            self._end(record)

    def note_refusal(self, peer: tuple[str, int] | None, *, reason: str, sent: int) -> None:
        """Tell the watchers of bytes that were no request and got status 400; the server answers those itself."""
        address = client_address(peer, [], trusted_hops=0)
        record = Record(self._new_id().encode(), self._clock(), address)
        record.status, record.sent_bytes, record.first_byte_at = ClientProblem.status, sent, record.started
        record.end, record.code = ClientProblem.end, ClientProblem.code
        record.reason, record.fault = reason, ClientProblem.fault
        self._begin(record, [])
        self._end(record)

    def _begin(self, record: Record, headers: Headers) -> None:
        for watcher in self._watchers:
            watcher.begin(record, headers)

    def _end(self, record: Record) -> None:
        now = self._clock()
        for watcher in self._watchers:
            watcher.end(record, now)

    async def _answer(self, problem: Problem, scope: Scope, send: Send) -> None:
        """Send the problem if nothing was sent yet; else leave the answer cut, which is what it is."""
        record: Record = scope[RECORD]
        record.end, record.code = problem.end, problem.code
        record.reason, record.fault = problem.reason, problem.fault
        if record.status:
            return
        if problem.status == 499:  # noqa: PLR2004  nobody is there
            record.status = 499
            return
        own = problem.headers()
        named = {name for name, _ in own}
        record.answer_fields = [field for field in record.answer_fields if field[0] not in named]
        body = problem.body(instance=shortened(record.path), request_id=record.request_id.decode())
        head = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
        head.append((b"cache-control", b"no-store"))
        start = {"type": "http.response.start", "status": problem.status, "headers": head + own, BODY_FOLLOWS: True}
        await send(start)
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _answering_handshakes(send: Send) -> Send:
    """Give a `send` that takes a response for the answer to a WebSocket's handshake (ASGI's extension for it)."""

    async def answering(message: Message) -> None:
        if message["type"].startswith("http."):
            message["type"] = f"websocket.{message['type']}"
        await send(message)

    return answering


def client_address(peer: tuple[str, int] | None, headers: Headers, *, trusted_hops: int) -> str:
    """Give the client's address: the peer's, or the X-Forwarded-For entry that the last trusted hop wrote.

    Counts from the right, since whatever stands further left the client may have made up. With fewer
    entries than trusted hops the request came round them, and the peer itself is meant.
    """
    own = peer[0] if peer is not None else "unknown"
    if trusted_hops == 0:
        return own
    written = b",".join(value for name, value in headers if name == b"x-forwarded-for")
    entries = [entry.strip() for entry in written.split(b",") if entry.strip()]
    if len(entries) < trusted_hops:
        return own
    return entries[-trusted_hops].decode("latin-1")[:64]


def _problem_of(error: HTTPException) -> Problem:
    if error.status_code == 405:  # noqa: PLR2004  Method Not Allowed
        return MethodNotAllowed((error.headers or {}).get("Allow", ""))
    return NotFound()
