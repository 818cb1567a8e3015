"""What a Redis that stops for a moment, for long, or with another clock leaves behind: nothing that stays wrong."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from proxy.admission import Limits
from proxy.limitsettings import parse_policies
from proxy.localtier import LocalTier
from proxy.model import CredentialKind, Principal
from proxy.operations import OPERATIONS
from proxy.outages import RedisDown
from proxy.redisclient import Courier, read_script
from proxy.redistier import SharedTier
from tests.support.redis import Redis, running_redis

INVOKE = next(row for row in OPERATIONS if row.name == "invoke")
CALLER = Principal("a", "a", "key:a", frozenset(), CredentialKind.API_KEY)
RUNS = '[[policies]]\nname = "runs"\nconcurrency = 5\n'


async def test_a_clock_that_jumps_ahead_degrades_for_moments_only() -> None:
    """Every call says until when it counts, on the server's clock as it was last known; that must be learnt anew."""
    behind = 0.0
    policies = parse_policies('[[policies]]\nname = "requests"\nrate = "1000/day"')
    plan = policies.plan("invoke")
    keys = [f"{{a}}:{quota.key}" for quota in plan.quotas]
    with running_redis() as redis:
        courier = Courier(redis.url, timeout=0.05, ticks=lambda: time.monotonic() - behind)
        shared = SharedTier(courier, LocalTier(), prefix="p", lease_seconds=25, without="local")
        shared.lay_out(policies)

        async def is_decided(number: int) -> bool:
            try:
                return (await shared.decide(plan, keys, f"lease-{number}"))[0]
            except RedisDown:
                return False

        async with shared.watching(), asyncio.timeout(30):
            while not await is_decided(0):  # a busy machine may be slower than the deadline
                await asyncio.sleep(0.05)
            behind = 1.0
            late = await is_decided(1)
            while shared.is_down or not await is_decided(2):
                await asyncio.sleep(0.05)

    assert not late


@contextmanager
def limits_on(redis: Redis, lease_seconds: float) -> Iterator[tuple[Limits, SharedTier]]:
    """Build limits on a Redis, for one loop."""
    local = LocalTier()
    shared = SharedTier(
        Courier(redis.url, timeout=0.05), local, prefix="p", lease_seconds=lease_seconds, without="local"
    )
    yield Limits(parse_policies(RUNS), partition_of=lambda name: name, local=local, shared=shared), shared


async def test_a_slot_that_was_in_doubt_is_held_on_redis_too() -> None:
    """Redis answers too late, the proxy decides alone: the run holds its slot, and nothing frees that meanwhile."""
    with running_redis() as redis, limits_on(redis, 30) as (limits, shared):
        async with shared.watching(), asyncio.timeout(30):
            (await limits.admit(CALLER, "a", INVOKE)).release()
            redis.pause()
            try:
                lease = await limits.admit(CALLER, "a", INVOKE)
            finally:
                redis.resume()
            while shared.is_down or shared._outstanding._freed:
                await asyncio.sleep(0.02)
            told = redis.ask("ZCARD p:{a}:runs:0c")
            lease.release()
            while redis.ask("ZCARD p:{a}:runs:0c") != ":0":
                await asyncio.sleep(0.05)

    assert told == ":1"


async def test_an_outage_leaves_a_bounded_memory_of_what_ran_meanwhile() -> None:
    """What ended after Redis has forgotten every lease by itself needs no telling."""
    with running_redis() as redis, limits_on(redis, 1) as (limits, shared):
        async with shared.watching(), asyncio.timeout(60):
            redis.kill()
            while not shared.is_down:
                (await limits.admit(CALLER, "a", INVOKE)).release()
            down = time.monotonic()
            while time.monotonic() - down < 1.1:
                await asyncio.sleep(0.05)
            for _ in range(5_000):
                (await limits.admit(CALLER, "a", INVOKE)).release()
            kept = sum(len(leases) for leases in shared._outstanding._freed.values())

    assert kept < 100


async def test_a_deadline_longer_than_a_second_is_kept() -> None:
    """Where `PROXY_REDIS_TIMEOUT_SECONDS` is five, a Redis that takes one has not failed."""
    plan = parse_policies('[[policies]]\nname = "requests"\nrate = "1000/day"').plan("invoke")
    with running_redis() as redis:
        shared = SharedTier(Courier(redis.url, timeout=5), LocalTier(), prefix="p", lease_seconds=25, without="local")
        async with shared.watching():
            redis.ask("CLIENT PAUSE 1200 ALL")
            admitted, _ = await shared.decide(plan, [f"{{a}}:{quota.key}" for quota in plan.quotas], "lease")

    assert admitted


async def test_what_cannot_be_sent_is_an_outage_and_no_cancellation() -> None:
    """Whatever the library raises, whoever waits is told RedisDown; who asks next is served."""
    script = read_script("release")
    with running_redis() as redis:
        courier = Courier(redis.url, timeout=5)
        try:
            waiting = [courier.run(script, [key], ["lease"]) for key in ("p:a", "p:\ud800", "p:b")]
            told = await asyncio.gather(*waiting, return_exceptions=True)
            after = await courier.run(script, ["p:c"], ["lease"])
        finally:
            await courier.close()

    assert [type(each) for each in told] == [RedisDown] * 3
    assert after
