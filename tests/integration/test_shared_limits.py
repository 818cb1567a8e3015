"""Limits that hold over four proxies with one Redis: exactly, and for what runs at once at the upstream's own count.

Each test has a tier of its own, for which one policy counts; what Redis may take to answer is no limit here, since
this machine may be busy.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.callers import ask, ask_at_once, invoke
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import Line, RawUpstream, answer, raw_upstream
from tests.support.redis import Redis, running_redis

SECRET = "the secret of the agent behind, 32+"
PROXIES = 4
CALLERS = 200
DEADLINE = 30.0
LIMITS = """
[[policies]]
name = "sliding"
rate = "off"
tiers = { sliding = "150/100 days" }

[[policies]]
name = "moving"
rate = "off"
strategy = "moving"
tiers = { moving = "150/100 days" }

[[policies]]
name = "fixed"
rate = "off"
strategy = "fixed"
tiers = { fixed = "150/100 days" }

[[policies]]
name = "concurrency"
concurrency = "off"
tiers = { runs = 7, storm = 100, dying = 3 }

[[policies]]
name = "together"
concurrency = "off"
per = "all"
tiers = { all = 5 }

[[policies]]
name = "tenant"
concurrency = "off"
per = "tenant"
tiers = { tenant = 4 }

[[policies]]
name = "edges"
rate = "off"
tiers = { edges = "40/second" }
"""


@dataclass(slots=True)
class Counting:
    """An upstream that does what the text asks for, and counts what runs."""

    running: int = 0
    most: int = 0
    seen: int = 0

    async def talk(self, line: Line) -> None:
        """Answer until the peer has gone."""
        while request := await line.request():
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
    """Four proxies, their Redis, and who may call."""

    redis: Redis
    principals: Principals
    directory: Path

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
            "PROXY_LIMITS": LIMITS,
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


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Run a Redis for all tests here."""
    with running_redis() as redis:
        yield House(redis, Principals(), tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
async def four(house: House) -> AsyncIterator[tuple[list[Proxy], Counting]]:
    """Run four proxies for all tests here."""
    async with house.proxies() as running:
        yield running


async def until(condition: Callable[[], bool], *, within: float = DEADLINE) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_four_proxies_admit_exactly_the_limit(house: House, four: tuple[list[Proxy], Counting]) -> None:
    """Two hundred callers at once: of 400 requests 150 are admitted for each strategy, not one more or less.

    What runs at once is never more than the limit, per caller, per tenant and over all, as upstream counts it. At the
    turn of windows a sliding one admits at most its own bound.
    """
    proxies, counting = four
    urls = [proxy.url for proxy in proxies]
    for tier in ("sliding", "moving", "fixed"):
        token = house.principals.token(f"eager-{tier}", tier=tier)
        statuses = await ask_at_once(urls, invoke(token), callers=CALLERS, each=2)
        assert statuses == {200: 150, 429: 250}, tier

    for tier, most in (("runs", 7), ("all", 5), ("tenant", 4)):
        counting.most = 0
        callers = [house.principals.token(f"{tier}-{number}", tier=tier, tenant="acme") for number in range(4)]
        tokens = callers if most < 7 else callers[:1]
        lines = [ask(urls[number % PROXIES], [invoke(tokens[number % len(tokens)])] * 3) for number in range(CALLERS)]
        answers = [status for each in await asyncio.gather(*lines) for status in each]
        assert 0 < counting.most <= most, tier
        assert set(answers) == {200, 429}

    began = time.time()
    statuses = await ask_at_once(urls, invoke(house.principals.token("edgy", tier="edges")), callers=CALLERS, each=6)
    windows = int(time.time()) - int(began) + 1
    assert 40 <= statuses[200] <= 40 * windows
    await until(lambda: house.leases() == 0)


async def test_no_lease_outlives_a_storm(house: House, four: tuple[list[Proxy], Counting]) -> None:
    """Six hundred runs that are left, crash or time out over four proxies leave no lease behind, and no wait."""
    proxies, counting = four
    counting.most = 0
    token = house.principals.token("stormy", tier="storm")
    lines = []
    for number in range(600):
        text = ("crash", "hang", "quick")[number % 3]
        leaves = 0.01 * (number % 7) if number % 2 else None
        lines.append(ask(proxies[number % PROXIES].url, [invoke(token, text)], leave_after=leaves))
    statuses = [status for each in await asyncio.gather(*lines) for status in each]

    await until(lambda: house.leases() == 0)
    after = await ask_at_once([proxy.url for proxy in proxies], invoke(token), callers=PROXIES, each=5)

    assert {502, 504} <= set(statuses)
    assert counting.most <= 100
    assert after == {200: 20}


async def test_a_dead_proxy_frees_its_leases(house: House) -> None:
    """Killed with its runs, a proxy holds its slots no longer than a lease lasts; those of a living one stay."""
    longer = {"PROXY_FIRST_BYTE_TIMEOUT_SECONDS": "60", "PROXY_LEASE_SECONDS": "2", "PROXY_GRACE_SECONDS": "0"}
    async with house.proxies(2, **longer) as (proxies, counting):
        token = house.principals.token("dying", tier="dying")
        hung = [asyncio.create_task(ask(proxies[0].url, [invoke(token, "hang")])) for _ in range(2)]
        hung.append(asyncio.create_task(ask(proxies[1].url, [invoke(token, "hang")])))
        await until(lambda: counting.running == 3)
        assert await ask(proxies[1].url, [invoke(token)]) == [429]

        proxies[0].process.send_signal(signal.SIGKILL)

        await until(lambda: house.leases() == 1)
        assert await ask(proxies[1].url, [invoke(token)]) == [200]
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)


async def test_a_proxy_that_ends_takes_its_leases_along(house: House) -> None:
    """SIGTERM while an invoke goes on that its client has left: Redis is told before the end, nothing need expire."""
    longer = {"PROXY_FIRST_BYTE_TIMEOUT_SECONDS": "60", "PROXY_LEASE_SECONDS": "30", "PROXY_GRACE_SECONDS": "0"}
    async with house.proxies(1, **longer) as ((proxy,), counting):
        token = house.principals.token("leaving", tier="dying")
        await ask(proxy.url, [invoke(token, "hang")], leave_after=0.3)
        await until(lambda: counting.running == 1)
        before = house.leases()

        proxy.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(proxy.process.wait, DEADLINE)

    assert (before, house.leases()) == (1, 0)
