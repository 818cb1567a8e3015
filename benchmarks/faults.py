"""What limits do under load while Redis is at fault, and what a storm of runs that end badly leaves behind.

Four proxies with one real Redis, or with a master, its replica and the sentinel that promotes it. Prints the rows of
the table in docs/limits.md: how long answers took and how much was admitted; then which leases are left of a storm.
"""

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support.callers import ask, invoke
from tests.support.principals import Principals
from tests.support.proxy import Proxy
from tests.support.redis import Redis, Watched, running_redis, running_sentinel
from tests.support.replicas import PROXIES, Counting, House, until

RUNS: Final = 5_000
AT_ONCE: Final = 200
CALLERS: Final = 16
PAUSE_SECONDS: Final = 0.03
"""Between an answer and the caller's next request: what is measured is not how long requests wait for a processor."""
SECONDS: Final = 3.0
AMOUNT: Final = 300
LIMITS: Final = f"""
[[policies]]
name = "requests"
rate = "off"
tiers = {{ steady = "100000000/day", counted = "{AMOUNT}/100 days" }}

[[policies]]
name = "concurrency"
concurrency = "off"
tiers = {{ storm = 400 }}
"""
type Act = Callable[[Redis], object]
FAULTS: Final[dict[str, tuple[Act, Act]]] = {
    "paused": (Redis.pause, Redis.resume),
    "killed, and back without its data": (Redis.kill, Redis.start),
    "full": (lambda redis: redis.ask("CONFIG SET maxmemory 1"), lambda redis: redis.ask("CONFIG SET maxmemory 0")),
    "read-only": (lambda redis: redis.ask("REPLICAOF 127.0.0.1 1"), lambda redis: redis.ask("REPLICAOF NO ONE")),
}
HEAD: Final = """
| Redis | before | at fault | after | the slowest above the median before | admitted |
|---|---|---|---|---|---|"""


async def _storm(house: House, proxies: list[Proxy], counting: Counting) -> None:
    token, numbers, statuses = house.principals.token("stormy", tier="storm"), iter(range(RUNS)), Counter[int]()

    async def line() -> None:
        for number in numbers:
            text = ("crash", "hang", "quick")[number % 3]
            leaves = 0.01 * (number % 7) if number % 2 else None
            answers = await ask(proxies[number % PROXIES].url, [invoke(token, text)], leave_after=leaves)
            statuses.update(answers or [0])

    began = time.monotonic()
    await asyncio.gather(*(line() for _ in range(AT_ONCE)))
    took = time.monotonic() - began
    await until(lambda: house.leases() == 0)
    print(f"\n{RUNS} runs in {took:.0f} s: {dict(sorted(statuses.items()))} (0: left); at most {counting.most} at once")
    print(f"leases left: {house.leases()}, {time.monotonic() - began - took:.1f} s after the last")


async def _fault(house: House, proxies: list[Proxy], name: str, break_it: Act, mend_it: Act) -> None:
    """Load all proxies while Redis breaks and is mended: one caller has no limit to reach, another has."""
    subjects = [(tier, f"{tier}-{name.split(maxsplit=1)[0].strip(',')}") for tier in ("steady", "counted")]
    tokens = [house.principals.token(subject, tier=tier) for tier, subject in subjects]
    times: list[tuple[float, float]] = []
    statuses, ends = Counter[int](), False

    async def line(number: int) -> None:
        while not ends:
            began = time.monotonic()
            counted = number % 2
            answers = await ask(proxies[number % PROXIES].url, [invoke(tokens[counted])])
            times.append((began, time.monotonic() - began))
            if counted:
                statuses.update(answers)
            await asyncio.sleep(PAUSE_SECONDS)

    lines = [asyncio.create_task(line(number)) for number in range(CALLERS)]
    await asyncio.sleep(SECONDS / 3)
    broken = time.monotonic()
    await asyncio.to_thread(break_it, house.redis)
    await asyncio.sleep(SECONDS)
    mended = time.monotonic()
    await asyncio.to_thread(mend_it, house.redis)
    await asyncio.sleep(SECONDS / 3)
    ends = True
    await asyncio.gather(*lines)
    spans = ((0, broken), (broken, mended), (mended, time.monotonic()))
    told = [_quantiles([took for at, took in times if begin <= at < end]) for begin, end in spans]
    above = max(told[1][2], told[2][2]) - told[0][0]
    cells = [" / ".join(f"{each * 1e3:.0f}" for each in three) for three in told]
    print(f"| {name} | {' | '.join(cells)} | {above * 1e3:.0f} | {statuses[200]} |", flush=True)


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    times = sorted(times) or [0.0]
    return times[len(times) // 2], times[len(times) * 99 // 100], times[-1]


def _follow(watched: Watched) -> None:
    """Wait until the replica is promoted."""
    while not watched.is_promoted:
        time.sleep(0.02)


async def _measure(redis: Redis, watched: Watched, directory: Path) -> None:
    house = House(redis, Principals(), directory, LIMITS)
    environment = {"PROXY_REDIS_TIMEOUT_SECONDS": "0.05", "PROXY_REPLICAS": str(PROXIES)}
    print(f"Redis at fault for {SECONDS:.0f} s, {CALLERS} callers; median / 99th percentile / worst, in ms", flush=True)
    print(HEAD, flush=True)
    async with house.proxies(**environment) as (proxies, _):
        for name, (break_it, mend_it) in FAULTS.items():
            await _fault(house, proxies, name, break_it, mend_it)
    house.redis = watched.master
    url = f"redis+sentinel://127.0.0.1:{watched.watcher.port}/limits"
    async with house.proxies(**environment, PROXY_REDIS_URL=url) as (proxies, _):
        await _fault(house, proxies, "killed, a replica promoted", Redis.kill, lambda _: _follow(watched))
    house.redis = redis
    async with house.proxies() as (proxies, counting):
        await _storm(house, proxies, counting)


def main() -> int:
    """Measure and print."""
    with running_redis() as redis, running_sentinel() as watched, tempfile.TemporaryDirectory() as directory:
        asyncio.run(_measure(redis, watched, Path(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
