"""A real proxy before an upstream that talks as a test wants, and those who call it.

What is asked of the log is waited for, since a line is written after the answer's last byte.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import RawUpstream, Talk, raw_upstream

SECRET = "s" * 48
RUN = {"text": "hi"}
EVENTS = {"Accept": "text/event-stream"}


@asynccontextmanager
async def proxy_before(
    talk: Talk, directory: Path, principals: Principals, **environment: str
) -> AsyncIterator[tuple[Proxy, RawUpstream]]:
    """Run a proxy before an upstream that talks as `talk` does."""
    async with raw_upstream(talk) as upstream:
        proxy = await asyncio.to_thread(
            start_proxy, directory, upstream.url, SECRET, **principals.environment(), **environment
        )
        try:
            yield proxy, upstream
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)


def client_of(proxy: Proxy, principals: Principals, **headers: str) -> httpx.AsyncClient:
    """Make a client that is signed in."""
    token = principals.token("alice")
    own = {"Authorization": f"Bearer {token}", **headers}
    return httpx.AsyncClient(base_url=proxy.url, headers=own, timeout=10, trust_env=False)


async def ended(proxy: Proxy, operation: str, **fields: object) -> dict[str, object]:
    """Wait for the access line of `operation`."""
    return await asyncio.to_thread(proxy.line_of, operation=operation, **fields)
