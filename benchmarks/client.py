"""The two kinds of callers: one that asks again as soon as it is answered, one that watches a stream.

Parses only what it must; never buffers a stream.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

from benchmarks.upstream import EPOCH, TIMESTAMP, TIMESTAMP_DIGITS

STAMP_AT = len(TIMESTAMP)
STAMP_END = STAMP_AT + TIMESTAMP_DIGITS


def measure_head(data: bytes) -> tuple[int, int, bool]:
    """Give where the body begins (0: not yet), its length (-1: chunked), and whether the connection then closes."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return 0, 0, False
    head = data[:end].lower()
    where = head.find(b"content-length:")
    length = int(head[where + 15 : head.index(b"\r\n", where)]) if where >= 0 else -1
    return end, length, b"connection: close" in head


@dataclass(slots=True)
class Tally:
    """What a group of asking callers has seen so far."""

    requests: list[bytes]
    deadline: float
    most: int
    expected: bytes
    sent: int = 0
    answered: int = 0
    errors: int = 0
    open: int = 0
    latencies: list[float] = field(default_factory=list)
    ended: float = 0.0

    def take(self) -> bytes | None:
        """Give the next request, or None when enough were sent or time is up."""
        if self.sent >= self.most or self.errors > 200 or time.monotonic() >= self.deadline:
            return None
        self.sent += 1
        return self.requests[self.sent % len(self.requests)]


class Asker(asyncio.Protocol):
    """One connection that sends its next request as soon as the last one is answered."""

    def __init__(self, tally: Tally, finish: Callable[["Asker", bool], None]) -> None:
        self.tally = tally
        self.finish = finish
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.sent_at = 0.0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask at once."""
        self.transport = cast("asyncio.Transport", transport)
        self._ask()

    def _ask(self) -> None:
        request = self.tally.take()
        if self.transport is None:
            return
        if request is None:
            self.transport.close()
            return
        self.waiting = True
        self.sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count the answer when it is whole, then ask again."""
        self.buffer = data = self.buffer + data if self.buffer else data
        start, length, closes = measure_head(data)
        if not start or (len(data) < start + length if length >= 0 else not data.endswith(b"0\r\n\r\n")):
            return
        tally = self.tally
        tally.latencies.append(time.perf_counter() - self.sent_at)
        tally.answered += 1
        tally.ended = time.monotonic()
        if data[9:12] != tally.expected:
            tally.errors += 1
        self.buffer = b""
        self.waiting = False
        if closes and self.transport is not None:
            self.transport.close()
        else:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the protocol's signature
        """Count an answer that never came; say whether to connect again."""
        self.transport = None
        tally = self.tally
        tally.errors += self.waiting
        again = tally.sent < tally.most and tally.errors <= 200 and time.monotonic() < tally.deadline
        self.finish(self, again)


@dataclass(slots=True)
class Watch:
    """What a group of stream watchers has seen; lateness is kept while `recording`."""

    recording: bool = False
    lateness: list[float] = field(default_factory=list)
    first_bytes: list[float] = field(default_factory=list)


class Watcher(asyncio.Protocol):
    """One open stream: notes when its first event came and how late each event is."""

    __slots__ = ("events", "finished", "head", "opened", "request", "sent_at", "status", "tail", "transport", "watch")

    def __init__(self, watch: Watch, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.watch = watch
        self.request = request
        self.transport: asyncio.Transport | None = None
        self.opened: asyncio.Future[bool] = loop.create_future()
        self.finished: asyncio.Future[bool] = loop.create_future()
        self.status = b""
        self.tail = b""
        self.head = True
        self.events = 0
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        self.transport = cast("asyncio.Transport", transport)
        self.sent_at = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Find the events in what has arrived."""
        now = time.monotonic() + EPOCH
        if self.tail:
            data = self.tail + data
        last = data[-5:]
        if self.head:
            start = data.find(b"\r\n\r\n") + 4
            if start < 4:
                self.tail = data
                return
            self.head = False
            self.status = data[9:12]
            data = data[start:]
            if self.status != b"200" and self.transport is not None:
                self.transport.close()
        self._count(data, now)
        if last == b"0\r\n\r\n" and not self.finished.done():
            self.finished.set_result(True)

    def _count(self, data: bytes, now: float) -> None:
        watch = self.watch
        at = data.find(TIMESTAMP)
        used = 0
        while at >= 0 and at + STAMP_END <= len(data):
            used = at + STAMP_END
            self.events += 1
            if watch.recording:
                with suppress(ValueError):  # a chunk's end may lie inside the number
                    watch.lateness.append(now - float(data[at + STAMP_AT : used]))
            at = data.find(TIMESTAMP, used)
        self.tail = data[max(used, len(data) - STAMP_END) :]
        if self.events and not self.opened.done():
            watch.first_bytes.append(time.perf_counter() - self.sent_at)
            self.opened.set_result(True)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the protocol's signature
        """Tell those who wait that nothing more will come."""
        self.transport = None
        for outcome in (self.opened, self.finished):
            if not outcome.done():
                outcome.set_result(False)

    def leave(self) -> None:
        """Go away without waiting for the stream's end."""
        if self.transport is not None:
            self.transport.abort()
