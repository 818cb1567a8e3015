"""A run's stream on its way to the client: its form, its heartbeats, and its end, told while it can be heard.

Decides nothing about lines (`framing` does) and nothing about when to end.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from proxy.aguievents import AgUiLines
from proxy.ends import End
from proxy.errors import BudgetSpentMidway
from proxy.forwarding import downstream_headers
from proxy.framing import PING, ErrorLines, EventFrames, LineTooLongError, RawLines
from proxy.model import Exchange, FlowRules, Headers, Inbox, Message, Send
from proxy.negotiation import EVENTS_TYPE, LINES_TYPE, Wish, are_lines, may_be_lines
from proxy.outages import LineTooLong, RunRefused, require_trust
from proxy.runs import Run

log: Final = logging.getLogger("agentflow_proxy.runs")
_OK: Final = 200
_LAST_WORDS_SECONDS: Final = 1.0
"""A client that does not read is not waited for longer when the stream is at its end."""


class Stream:
    """One stream: what of it has been written, and how the rest will be. Implements `model.Outlet`.

    What arrives is passed on in upstream's own callback while the client reads, for as long as `inbox` tells that it
    does; else by this stream's task.
    """

    def __init__(self, run: Run, rules: FlowRules, send: Send, inbox: Inbox | None = None) -> None:
        request_id = run.record.request_id.decode()
        self._run = run
        self._rules = rules
        self._send = send
        self._inbox = inbox
        self._form: Callable[[bytes], bytes] | None = None
        """Gives what can be written of what has arrived; known once it is."""
        self._errors = ErrorLines(request_id, rules.error_detail, self._tell)
        self._frames = EventFrames(request_id, self._errors, rules.max_line) if run.wish is Wish.EVENTS else None
        self._begun = False
        self._overspent = False

    def deliver(self, exchange: Exchange) -> Awaitable[None]:
        """Pass the answer on, whole. Raises a Problem; `conclude` may then still tell it."""
        if self._frames is None or not self._rules.heartbeat:
            return self._deliver(exchange)
        return self._deliver_beating(exchange)

    async def _deliver_beating(self, exchange: Exchange) -> None:
        beat = _Heart(exchange, self._rules.heartbeat)
        try:
            await self._deliver(exchange)
        finally:
            beat.stop()

    async def conclude(self, end: End) -> None:
        """Tell the end of a stream of events that could not be delivered whole; any other is left cut."""
        if self._begun and self._frames is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_SECONDS):
                    await self._write(self._frames.end(end), more=False)

    async def _deliver(self, exchange: Exchange) -> None:
        while not await exchange.head():
            await self._begin(_OK, [])
            await self._write(PING)
        require_trust(exchange.status)
        lines = exchange.status == _OK and may_be_lines(exchange.headers)
        if self._frames is not None and lines:
            await self._begin(_OK, exchange.headers)
            await self._deliver_events(exchange, self._frames)
        elif self._begun:
            raise RunRefused(reason=f"status {exchange.status}")
        elif lines:
            await self._deliver_lines(exchange)
        else:
            self._frames = None
            await self._begin(exchange.status, exchange.headers)
            while not exchange.ended:
                await self._write(await exchange.read(), more=not exchange.ended)

    async def _deliver_events(self, exchange: Exchange, frames: EventFrames) -> None:
        first = b""
        while (verdict := are_lines(first)) is None and not exchange.ended:
            data = self._noted(await self._next(exchange))
            first += data
            if not data and not exchange.ended:
                await self._write(PING)
        if verdict is False:  # server-sent events already, with whatever end they have
            self._frames = None
            await self._write(first, more=not exchange.ended)
            while not exchange.ended:
                data = await exchange.read()
                if data or exchange.ended:  # nudged: a comment could fall into the middle of one of its lines
                    await self._write(data, more=not exchange.ended)
            return
        self._form = frames.feed
        try:
            body = frames.feed(first)
            while not exchange.ended:
                if body:
                    await self._write(body)
                del body  # others are passed on, and this one would be held
                data = self._noted(await self._next(exchange))
                body = frames.feed(data) if data or exchange.ended else PING
            body += frames.finish()
        except LineTooLongError as error:
            if error.frames:
                await self._write(error.frames)
            raise LineTooLong from error
        await self._write(body + frames.end(self._settle()), more=False)

    async def _deliver_lines(self, exchange: Exchange) -> None:
        form = AgUiLines if self._run.wish is Wish.AG_UI else RawLines
        lines = form(self._errors, self._rules.max_line)
        first = b""
        verdict = None
        if self._run.wish is Wish.LINES:
            while verdict is None and not exchange.ended:
                first += self._noted(await self._next(exchange))
                verdict = are_lines(first)
        await self._begin(_OK, exchange.headers, media=LINES_TYPE if verdict else b"", resized=True)
        self._form = lines.feed
        body = lines.feed(first) if first else b""
        while not exchange.ended:
            if body:
                await self._write(body)
            del body  # others are passed on, and this one would be held
            body = lines.feed(self._noted(await self._next(exchange)))
        body += lines.finish()
        self._settle()
        await self._write(body, more=False)

    def _next(self, exchange: Exchange) -> Awaitable[bytes]:
        if self._overspent:
            raise BudgetSpentMidway
        return exchange.read(self)

    @property
    def is_open(self) -> bool:
        """See `model.Outlet`."""
        return self._form is not None and self._inbox is not None and self._inbox.is_writable

    def pass_on(self, data: bytes) -> None:
        """See `model.Outlet`."""
        assert self._form is not None  # noqa: S101  it is open
        if body := self._form(self._noted(data)):
            _send_now(self._send, {"type": "http.response.body", "body": body, "more_body": True})
        if self._overspent:
            raise BudgetSpentMidway

    def _noted(self, data: bytes) -> bytes:
        self._overspent = not self._run.spending.take(data) and self._rules.stop_over_budget
        return data

    def _settle(self) -> End:
        """Say how the run ended whose answer is whole."""
        record = self._run.record
        if self._errors.run_failed:
            record.end = End.UPSTREAM_ERROR
        elif self._run.stop_asked:
            record.end = End.STOPPED
        return record.end

    async def _begin(self, status: int, headers: Headers, *, media: bytes = b"", resized: bool = False) -> None:
        """Send the head, once; of another type with `media`, without a length where the body is `resized`.

        A stream is its connection's last answer: a drain that begins meanwhile can announce nothing in this head, and
        whoever kept the connection would send the next request to where nobody is (docs/adr/0021).
        """
        if self._begun:
            return
        self._begun = True
        if self._frames is not None:
            media, resized = EVENTS_TYPE + b"; charset=utf-8", True
        not_so = {b"content-length": resized, b"content-type": bool(media)}
        head = [field for field in downstream_headers(headers, status=status) if not not_so.get(field[0])]
        if media:
            head.append((b"content-type", media))
        head.append((b"connection", b"close"))
        headers.clear()  # an open stream needs them no more
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _tell(self, said: dict[str, Any]) -> None:
        log.warning("run.failed", extra={"fields": {"request_id": self._run.record.request_id.decode(), "said": said}})


def _send_now(send: Send, message: Message) -> None:
    """Send to a client that reads: nothing is waited for, so it can be done outside of any task."""
    sending = send(message).__await__()
    try:
        next(sending)
    except StopIteration:
        return
    raise RuntimeError("the server waits, and said it would not")


class _Heart:
    """Nudges an exchange whenever nothing came from it for `seconds`."""

    def __init__(self, exchange: Exchange, seconds: float) -> None:
        self._exchange = exchange
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        due = max(self._last, self._exchange.active) + self._seconds
        if now >= due:
            self._last = now
            self._exchange.nudge()
            due = now + self._seconds
        self._timer = self._loop.call_at(due, self._look)

    def stop(self) -> None:
        self._timer.cancel()
