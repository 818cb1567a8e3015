"""A steady load on an installation: so many streams at any time, and invokes at a pace; whatever fails is written down.

It never asks twice: a request that fails is a failure.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

PER_ADDRESS = 90
"""Streams from one client's address; the edge bounds them at 100."""
_UNREADABLE = (ValueError, LookupError, TypeError)
"""Raised for an answer that is whole and not what was asked for, such as a stream that ends in an error line."""


@dataclass(slots=True)
class Load:
    """What was asked so far, how long invokes took (seconds), and what failed."""

    words: int
    pace_ms: int
    streams: int = 0
    invokes: int = 0
    running: int = 0
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    over: bool = False

    async def keep_streaming(self, client: httpx.AsyncClient) -> None:
        """Hold one stream after another, until it is over."""
        text = f"[words {self.words}] [pace {self.pace_ms}ms]"
        while not self.over:
            seen = b""
            self.running += 1
            try:
                async with client.stream("POST", "/agent/stream", json={"text": text}) as answer:
                    async for part in answer.aiter_raw():
                        seen = (seen + part)[-4096:]
                if answer.status_code != 200 or not self._is_whole(seen):
                    self.failures.append(f"stream: {answer.status_code} {seen[-300:]!r}")
            except (httpx.TransportError, *_UNREADABLE) as error:
                self.failures.append(f"stream: {error!r} after {seen[-300:]!r}")
            self.running -= 1
            self.streams += 1

    async def keep_invoking(self, client: httpx.AsyncClient, every: float) -> None:
        """Invoke at a pace (seconds between), until it is over."""
        asked: set[asyncio.Task[None]] = set()
        while not self.over:
            asked.add(asyncio.create_task(self._invoke(client)))
            await asyncio.sleep(every)
        await asyncio.gather(*asked)

    async def _invoke(self, client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        try:
            answer = await client.post("/agent/invoke", json={"text": "hi"})
            if answer.status_code != 200 or _text(answer.json()["data"]["messages"][-1]) != "You said: hi":
                self.failures.append(f"invoke: {answer.status_code} {answer.text[:300]}")
        except (httpx.TransportError, *_UNREADABLE) as error:
            self.failures.append(f"invoke: {error!r}")
        self.invokes += 1
        self.seconds.append(time.monotonic() - began)

    def _is_whole(self, end: bytes) -> bool:
        last = json.loads(end.splitlines()[-1])["message"]
        return not last["delta"] and _text(last).rstrip().endswith(f"w{self.words}")


@asynccontextmanager
async def steady_load(
    url: str, token: str, *, streams: int, invoke_every: float, words: int = 20, pace_ms: int = 100
) -> AsyncIterator[Load]:
    """Load the installation at `url` until the block ends, and then until what runs is answered."""
    load = Load(words, pace_ms)
    clients = [_client(url, token, f"127.0.0.{100 + number}") for number in range(streams // PER_ADDRESS + 2)]
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(load.keep_streaming(clients[number // PER_ADDRESS]))
            group.create_task(load.keep_invoking(clients[-1], invoke_every))
            while load.running < streams and not load.failures:
                await asyncio.sleep(0.01)
            try:
                yield load
            finally:
                load.over = True
    finally:
        for client in clients:
            await client.aclose()


def _client(url: str, token: str, address: str) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(local_address=address, limits=httpx.Limits(max_connections=None))
    fields = {"Authorization": f"Bearer {token}"}
    return httpx.AsyncClient(base_url=url, headers=fields, transport=transport, timeout=60)


def _text(message: dict[str, Any]) -> str:
    return str(message["content"][0]["text"])
