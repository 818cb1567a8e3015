"""What limits do under load while Redis is at fault, and what a storm of runs that end badly leaves behind.

Four proxies with one real Redis. Prints how long answers took, how much was admitted, and which leases are left;
docs/limits.md has the table.
"""

import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

from tests.support.callers import ask, invoke
from tests.support.principals import Principals
from tests.support.proxy import Proxy
from tests.support.redis import Redis, running_redis
from tests.support.replicas import PROXIES, Counting, House, until

RUNS: Final = 5_000
AT_ONCE: Final = 200
CALLERS: Final = 16
SECONDS: Final = 3.0
AMOUNT: Final = 400
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
FAULTS: Final = {
    "none": (lambda redis: redis.ask("PING"), lambda redis: redis.ask("PING")),
    "paused": (Redis.pause, Redis.resume),
    "killed": (Redis.kill, Redis.start),
    "full": (lambda redis: redis.ask("CONFIG SET maxmemory 1"), lambda redis: redis.ask("CONFIG SET maxmemory 0")),
    "read-only": (
        lambda redis: redis.ask("REPLICAOF 127.0.0.1 1"),
        lambda redis: redis.ask("REPLICAOF NO ONE"),
    ),
}


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
    print(f"{RUNS} runs in {took:.0f} s: {dict(sorted(statuses.items()))} (0: left); at most {counting.most} at once")
    print(f"leases left: {house.leases()}, {time.monotonic() - began - took:.1f} s after the last")


async def _fault(house: House, proxies: list[Proxy], name: str) -> None:
    """Load all proxies while Redis breaks and is mended: one caller has no limit to reach, another has."""
    tokens = [house.principals.token(f"{tier}-{name}", tier=tier) for tier in ("steady", "counted")]
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

    lines = [asyncio.create_task(line(number)) for number in range(CALLERS)]
    await asyncio.sleep(SECONDS / 3)
    broken = time.monotonic()
    await asyncio.to_thread(FAULTS[name][0], house.redis)
    await asyncio.sleep(SECONDS)
    mended = time.monotonic()
    await asyncio.to_thread(FAULTS[name][1], house.redis)
    await asyncio.sleep(SECONDS / 3)
    ends = True
    await asyncio.gather(*lines)
    told = [_quantiles([took for at, took in times if begin <= at < end]) for begin, end in
            ((0, broken), (broken, mended), (mended, time.monotonic()))]  # fmt: skip
    recovered = [line["down_seconds"] for proxy in proxies for line in proxy.log_lines()
                 if line["event"] == "limits.recovered"]  # fmt: skip
    print(f"{name:<10} before {told[0]}, at fault {told[1]}, after {told[2]}; admitted {statuses[200]} of {AMOUNT};"
          f" recovered {len(recovered)} times so far")  # fmt: skip


def _quantiles(times: list[float]) -> str:
    times = sorted(times) or [0.0]
    middle, late = times[len(times) // 2], times[len(times) * 99 // 100]
    return f"{middle * 1e3:.0f}/{late * 1e3:.0f}/{times[-1] * 1e3:.0f} ms"


async def _measure(redis: Redis, directory: Path) -> None:
    house = House(redis, Principals(), directory, LIMITS)
    async with house.proxies() as (proxies, counting):
        await _storm(house, proxies, counting)
    print(f"\nRedis at fault for {SECONDS:.0f} s, {CALLERS} callers; median/99th percentile/worst")
    async with house.proxies(PROXY_REDIS_TIMEOUT_SECONDS="0.05", PROXY_REPLICAS=str(PROXIES)) as (proxies, _):
        for name in FAULTS:
            await _fault(house, proxies, name)


def main() -> int:
    """Measure and print."""
    with running_redis() as redis, tempfile.TemporaryDirectory() as directory:
        asyncio.run(_measure(redis, Path(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
