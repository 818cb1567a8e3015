"""Several proxies with one Redis, before an upstream that counts what runs at once."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import Line, RawUpstream, answer, raw_upstream
from tests.support.redis import Redis

SECRET = "the secret of the agent behind, 32+"
PROXIES = 4
DEADLINE = 30.0


@dataclass(slots=True)
class Counting:
    """An upstream that does what the text asks for, and counts what runs."""

    running: int = 0
    most: int = 0
    seen: int = 0

    async def talk(self, line: Line) -> None:
        """Answer until the peer has gone; to be asked to stop a run is none."""
        while request := await line.request():
            if b"/v1/graph/stop " in request:
                await line.write(answer(b"{}", "content-type: application/json"))
                continue
            self.running += 1
            self.seen += 1
            self.most = max(self.most, self.running)
            try:
                if b"crash" in request:
                    line.reset()
                    return
                if b"hang" in request:
                    await line.gone()
                    return
                await asyncio.sleep(0.01)
            finally:
                self.running -= 1
            await line.write(answer(b"{}", "content-type: application/json"))


@dataclass(slots=True)
class House:
    """Some proxies, their Redis, and who may call; `limits` are their policies in TOML."""

    redis: Redis
    principals: Principals
    directory: Path
    limits: str

    @asynccontextmanager
    async def proxies(self, count: int = PROXIES, **environment: str) -> AsyncIterator[tuple[list[Proxy], Counting]]:
        """Start them before an upstream that counts."""
        counting = Counting()
        async with raw_upstream(counting.talk) as upstream:
            started: list[Proxy] = []
            try:
                starts = [asyncio.to_thread(self._start, upstream, environment) for _ in range(count)]
                started += await asyncio.gather(*starts)
                yield started, counting
            finally:
                for proxy in started:
                    await asyncio.to_thread(stop_proxy, proxy.process)

    def _start(self, upstream: RawUpstream, environment: dict[str, str]) -> Proxy:
        settings = {
            "PROXY_LIMITS": self.limits,
            "PROXY_REDIS_URL": self.redis.url,
            "PROXY_REDIS_TIMEOUT_SECONDS": "5",
            "PROXY_FIRST_BYTE_TIMEOUT_SECONDS": "1",
            "PROXY_LEASE_SECONDS": "3",
        }
        settings |= self.principals.environment() | environment
        return start_proxy(self.directory, upstream.url, SECRET, **settings)

    def leases(self) -> int:
        """Count the leases that Redis holds to, and that have not run out."""
        now = time.time_ns() // 1000
        keys = self.redis.ask_all("KEYS agentflow-proxy:*c")
        return sum(int(self.redis.ask(f"ZCOUNT {key} {now} +inf").removeprefix(":")) for key in keys)


async def until(condition: Callable[[], bool], *, within: float = DEADLINE) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
