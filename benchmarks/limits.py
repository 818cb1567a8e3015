"""What one decision about limits costs: in process, and on a real Redis, alone and with others under way.

Prints µs of CPU of this process, and of the clock, for policies as operators write them.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import uvloop

from proxy.admission import Limits
from proxy.limitsettings import parse_policies
from proxy.localtier import LocalTier
from proxy.model import CredentialKind, Principal
from proxy.operations import OPERATIONS
from proxy.redisclient import Courier
from proxy.redistier import SharedTier
from tests.support.redis import running_redis

DECISIONS = 4_000
AT_ONCE = 50
CALLER = Principal("a", "a", "key:a", frozenset(), CredentialKind.API_KEY)
INVOKE = next(row for row in OPERATIONS if row.name == "invoke")
RATE = '[[policies]]\nname = "requests"\nrate = "100000000/minute"\n'
RUNS = '[[policies]]\nname = "concurrency"\nconcurrency = 1000\n'
TOKENS = '[[policies]]\nname = "tokens"\ntokens = "100000000/hour"\n'
POLICIES = {
    "a rate": RATE,
    "two windows": RATE.replace("/minute", "/minute;900000000/day"),
    "a rate and runs": RATE + RUNS,
    "a rate, runs, tokens": RATE + RUNS + TOKENS,
}


async def _alone(ask: Callable[[], Awaitable[object]]) -> None:
    for _ in range(DECISIONS):
        await ask()


async def _at_once(ask: Callable[[], Awaitable[object]]) -> None:
    async def line() -> None:
        for _ in range(DECISIONS // AT_ONCE):
            await ask()

    await asyncio.gather(*(line() for _ in range(AT_ONCE)))


async def _print(
    name: str, limits: Limits, drive: Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]
) -> None:
    async def ask() -> None:
        (await limits.admit(CALLER, "payer", INVOKE)).release()

    await ask()
    spent, began = time.process_time(), time.perf_counter()
    await drive(ask)
    cpu, took = time.process_time() - spent, time.perf_counter() - began
    print(f"{name:<44} {cpu / DECISIONS * 1e6:>8.1f} µs CPU {took / DECISIONS * 1e6:>8.1f} µs")


async def _measure(url: str) -> None:
    for name, text in POLICIES.items():
        limits = Limits(parse_policies(text), partition_of=str, local=LocalTier())
        await _print(f"in process: {name}", limits, _alone)
    for name, text in POLICIES.items():
        local = LocalTier()
        tier = SharedTier(Courier(url, timeout=5), local, prefix="bench", lease_seconds=25, without="refuse")
        limits = Limits(parse_policies(text), partition_of=str, local=local, shared=tier)
        async with limits.watching():
            await _print(f"on Redis, one at a time: {name}", limits, _alone)
            await _print(f"on Redis, {AT_ONCE} at once: {name}", limits, _at_once)


def main() -> int:
    """Measure and print."""
    with running_redis() as redis:
        uvloop.run(_measure(redis.url))
    return 0


if __name__ == "__main__":
    sys.exit(main())
