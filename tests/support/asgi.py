"""The two ends of ASGI and an upstream, as fakes that a test steps through.

They keep order and cancellation exactly; they are no proof about sockets.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from proxy.ends import End
from proxy.errors import ClientLeft
from proxy.leases import NoLease
from proxy.model import Deadlines, FlowRules, Headers, Outlet, Record, UpstreamRequest
from proxy.negotiation import Wish
from proxy.runs import Run, Spending
from proxy.usage import reader_for

type Message = dict[str, Any]


@dataclass
class Client:
    """A client that has sent `incoming` and leaves when told to."""

    incoming: list[Message] = field(default_factory=list)
    sent: list[Message] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    block: asyncio.Event | None = None
    """While set to an unset event, `send` waits: a client that does not read."""

    keeps: bool = True
    """Whether all that was sent is kept, rather than the last message alone."""

    async def receive(self) -> Message:
        if self.incoming:
            return self.incoming.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.block is not None:
            await self.block.wait()
        if not self.keeps:
            self.sent.clear()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        """All bytes of body sent so far."""
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def is_complete(self) -> bool:
        """Whether the answer was ended."""
        return bool(self.sent) and self.sent[-1].get("more_body") is False


@dataclass
class FakeExchange:
    """An answer made of `parts`; an exception among them is raised, a callable is awaited first."""

    parts: list[bytes | Exception | Callable[[], Any]]
    status: int = 200
    headers: Headers = field(default_factory=lambda: [(b"content-type", b"text/event-stream")])
    abandoned: Exception | None = None
    ended: bool = False
    active: float = 0.0
    before: Callable[[], Any] | None = None
    """Awaited before the head is there."""
    early: int = 0
    """So often `nudge` comes before the head."""
    nudged: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def has_body(self) -> bool:
        return isinstance(self.parts[0], bytes) if self.parts else True

    async def head(self) -> bool:
        if self.early:
            self.early -= 1
            await asyncio.sleep(0)
            return False
        if self.before is not None:
            await self.before()
            self.before = None
        return True

    def nudge(self) -> None:
        self.nudged.set()

    async def read(self, outlet: Outlet | None = None) -> bytes:
        while self.parts:
            part = self.parts.pop(0)
            if isinstance(part, Exception):
                raise part
            if isinstance(part, bytes):
                return part
            try:
                await part()
            except asyncio.CancelledError:
                self.parts.insert(0, part)  # to cancel a read changes nothing
                raise
        self.ended = True
        return b""

    def abandon(self) -> None:
        if self.abandoned is None:
            self.abandoned = ClientLeft()


@dataclass
class FakeUpstream:
    """Gives `exchange`, or raises it; `before` is awaited first."""

    exchange: FakeExchange | Exception
    before: Callable[[], Any] | None = None
    requests: list[UpstreamRequest] = field(default_factory=list)

    async def start(self, request: UpstreamRequest, deadlines: Deadlines) -> FakeExchange:
        self.requests.append(request)
        if self.before is not None:
            await self.before()
        if isinstance(self.exchange, Exception):
            raise self.exchange
        return self.exchange


RULES = FlowRules(heartbeat=0, max_line=1 << 20, error_detail="safe", stop_on_disconnect=False, stop_over_budget=True)
STOP = UpstreamRequest(b"POST", b"/v1/graph/stop", (), b"{}")


class FakeLease(NoLease):
    """Counts what is done with it; its budget is `tokens`."""

    def __init__(self, tokens: int = 1 << 60) -> None:
        super().__init__([])
        self.tokens = tokens
        self.released = 0

    def charge(self, tokens: int, *, estimated: bool) -> bool:
        self.tokens -= tokens
        return self.tokens > 0

    def release(self) -> None:
        self.released += 1


def run_of(wish: Wish | None = None, lease: FakeLease | None = None) -> Run:
    """Make a run as the routes do: a stream with a `wish`, else an invoke."""
    record = Record(b"r-1", 0.0, "127.0.0.1")
    reader = reader_for("answer" if wish is None else "ag-ui" if wish is Wish.AG_UI else "stream")
    return Run(record, "tag~thread", lambda: STOP, wish, Spending(reader, lease or FakeLease(), record))


def end_of(run: Run) -> End:
    """Give how a run was recorded to have ended."""
    return run.record.end
