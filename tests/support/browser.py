"""A real Chromium, and the one origin that it sees: a page of the test's, and the proxy behind the same port.

The page tells what it found by posting it to `/found`. Nothing is fetched from anywhere else.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.programs import require

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
)  # fmt: skip


def require_chromium() -> str:
    """Give the browser's path. Without one httpx-sse and our own parser still read the same streams."""
    return require("chromium", "chromium-browser", "google-chrome", package="chromium")


@dataclass(slots=True)
class Origin:
    """Where the page is, and what it found."""

    url: str = ""
    found: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@asynccontextmanager
async def origin_of(page: str, proxy_url: str) -> AsyncIterator[Origin]:
    """Serve `page` at `/`, and let every other request go to the proxy, byte for byte."""
    origin = Origin()
    host, _, port = proxy_url.removeprefix("http://").partition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1]
            if path == b"/found":
                length = next(
                    int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line
                )
                origin.found.set_result(json.loads(await reader.readexactly(length)))
                writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
            elif path.startswith(b"/agent"):
                near, far = await asyncio.open_connection(host, int(port))
                # One request on a connection, so that whose it is need not be told again.
                far.write(head.replace(b"Connection: keep-alive", b"Connection: close"))
                done = [asyncio.ensure_future(pump(reader, far)), asyncio.ensure_future(pump(near, writer))]
                await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.cancel()
                far.close()
            else:
                body = page.encode() if path == b"/" else b""
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=utf-8\r\nconnection: close\r\n")
                writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    origin.url = "http://{}:{}/".format(*server.sockets[0].getsockname())
    try:
        yield origin
    finally:
        server.close()


async def browse(origin: Origin, profile: Path, *, seconds: float = 60) -> Any:
    """Open the page in a new browser, and give what it found."""
    process = await asyncio.create_subprocess_exec(
        require_chromium(),
        *FLAGS,
        f"--user-data-dir={profile}",
        origin.url,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            return await origin.found
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # the group that it leads: all of one browser's processes, and no other
        await process.wait()
