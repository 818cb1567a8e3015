"""An upstream that writes whatever bytes a test wants, over real sockets.

It keeps no rule of HTTP by itself; what it was sent it tells.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

type Talk = Callable[["Line"], Awaitable[None]]


@dataclass(slots=True)
class Line:
    """One accepted connection, the `number`th from 1."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def request(self) -> bytes:
        """Read one request, head and body; empty when the peer closed instead."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return head + await self.reader.readexactly(length)

    async def write(self, data: bytes) -> None:
        """Write and flush."""
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self) -> None:
        """Wait until the peer has closed or reset the connection."""
        try:
            while await self.reader.read(65_536):
                pass
        except ConnectionError:
            pass

    def reset(self) -> None:
        """Close with RST rather than FIN."""
        self.writer.transport.abort()


@dataclass(slots=True)
class RawUpstream:
    """Where it listens, and how many connections it has accepted."""

    url: str
    accepted: int = 0
    requests: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def raw_upstream(talk: Talk, *, at: tuple[str, int] | Path = ("127.0.0.1", 0)) -> AsyncIterator[RawUpstream]:
    """Serve each connection with `talk`; close it when `talk` returns.

    A path is a Unix socket's; by default it is a free port of the loopback.
    """
    upstream = RawUpstream("")
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        upstream.accepted += 1
        try:
            await talk(Line(upstream.accepted, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            talks.discard(task)
            writer.close()

    if isinstance(at, Path):
        server: asyncio.Server = await asyncio.start_unix_server(serve, at)
        upstream.url = f"http+unix://{at}"
    else:
        server = await asyncio.start_server(serve, *at)
        upstream.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield upstream
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


def answer(body: bytes, *fields: str, status: str = "200 OK") -> bytes:
    """Write a whole answer with its length."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def chunk(data: bytes) -> bytes:
    """Write one chunk (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
