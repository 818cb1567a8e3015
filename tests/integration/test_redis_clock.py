"""A Redis whose clock is set, or that another with another clock takes over from: limits are shared again soon."""

import asyncio
import time

from proxy.limitsettings import parse_policies
from proxy.localtier import LocalTier
from proxy.redisclient import Courier, RedisDown
from proxy.redistier import SharedTier
from tests.support.redis import running_redis


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
