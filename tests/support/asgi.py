"""The two ends of ASGI and an upstream, as fakes that a test steps through.

They keep order and cancellation exactly; they are no proof about sockets.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from proxy.model import Deadlines, Headers, UpstreamRequest

type Message = dict[str, Any]


@dataclass
class Client:
    """A client that has sent `incoming` and leaves when told to."""

    incoming: list[Message] = field(default_factory=list)
    sent: list[Message] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    block: asyncio.Event | None = None
    """While set to an unset event, `send` waits: a client that does not read."""

    async def receive(self) -> Message:
        if self.incoming:
            return self.incoming.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.block is not None:
            await self.block.wait()
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

    async def read(self) -> bytes:
        while self.parts:
            part = self.parts.pop(0)
            if isinstance(part, Exception):
                raise part
            if isinstance(part, bytes):
                return part
            await part()
        self.ended = True
        return b""

    def abandon(self, reason: Exception) -> None:
        if self.abandoned is None:
            self.abandoned = reason


@dataclass
class FakeUpstream:
    """Gives `exchange`, or raises it; `before` is awaited first."""

    exchange: FakeExchange | Exception
    before: Callable[[], Any] | None = None
    requests: list[UpstreamRequest] = field(default_factory=list)

    async def begin(self, request: UpstreamRequest, deadlines: Deadlines) -> FakeExchange:
        self.requests.append(request)
        if self.before is not None:
            await self.before()
        if isinstance(self.exchange, Exception):
            raise self.exchange
        return self.exchange
