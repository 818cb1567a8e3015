"""Counts of this process alone: every quota of a plan is charged, or none, through slowapi's limiters.

Exact for one proxy, and bounded: a million callers take no more memory than a hundred thousand.
"""

import time
from collections.abc import Callable, Sequence
from typing import override

import limits

from proxy.limits import QuietLimiter
from proxy.policies import MOST_PLANS, Plan, Quota, Strategy
from proxy.standings import Standing, concurrent, fits, fixed, left_of, moving, sliding


class QuotaItem(limits.RateLimitItemPerSecond):
    """A quota as slowapi's limiters want it; the key that they are given is the whole key."""

    def __init__(self, quota: Quota) -> None:
        super().__init__(quota.amount, quota.window)

    @override
    def key_for(self, *identifiers: bytes | str | float) -> str:
        return str(identifiers[0])


class LocalTier:
    """The counts of one process. `clock` gives Unix seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        limiter = QuietLimiter(clock=clock)
        self._storage = limiter.storage
        self._hit_sliding = limiter.limiter.hit
        self._running: dict[str, int] = {}
        self._items: dict[Plan, tuple[QuotaItem, ...]] = {}

    def decide(self, plan: Plan, keys: Sequence[str]) -> tuple[bool, list[Standing]]:
        """Charge every quota under its key, or none; give whether that was possible, and how each stands now."""
        quotas, items, storage = plan.quotas, self._items.get(plan) or self._items_of(plan), self._storage
        storage.moment = self._clock()
        try:
            if len(quotas) == 1 and quotas[0].strategy is Strategy.SLIDING and quotas[0].cost and not quotas[0].shadow:
                admitted = self._hit_sliding(items[0], keys[0], cost=quotas[0].cost)
                return admitted, [self._standing(quotas[0], keys[0], fit=admitted)]
            fit = [self._fits(quota, key) for quota, key in zip(quotas, keys, strict=True)]
            admitted = all(each or quota.shadow for each, quota in zip(fit, quotas, strict=True))
            if admitted:
                for each, quota, key in zip(fit, quotas, keys, strict=True):
                    if each and quota.cost:
                        self.note(quota, key)
            told = zip(fit, quotas, keys, strict=True)
            return admitted, [self._standing(quota, key, fit=each) for each, quota, key in told]
        finally:
            storage.moment = None

    def peek(self, plan: Plan, keys: Sequence[str]) -> list[Standing]:
        """Say how each quota stands, without charging."""
        self._storage.moment = self._clock()
        try:
            pairs = zip(plan.quotas, keys, strict=True)
            return [self._standing(quota, key, fit=self._fits(quota, key)) for quota, key in pairs]
        finally:
            self._storage.moment = None

    def enter(self, key: str) -> None:
        """Count a run whose slot was taken elsewhere."""
        self._running[key] = self._running.get(key, 0) + 1

    def note(self, quota: Quota, key: str) -> None:
        """Count what was found to fit, here or elsewhere: of that, this process knows its part."""
        if quota.strategy is Strategy.CONCURRENCY:
            self.enter(key)
        elif quota.strategy is Strategy.MOVING:
            self._storage.acquire_entry(key, quota.amount, quota.window, quota.cost)
        else:
            self._storage.add(key, quota.window, quota.cost)

    def leave(self, key: str, lease: str = "") -> None:  # noqa: ARG002  one slot is like another
        """Free a slot."""
        count = self._running[key] - 1
        if count:
            self._running[key] = count
        else:
            del self._running[key]

    def charge(self, quota: Quota, key: str, amount: int, *, over: bool = True) -> bool:  # noqa: ARG002  told to nobody
        """Charge what was used already; give whether something is left."""
        self._storage.add(key, quota.window, amount)
        return self._fits(quota, key)

    @property
    def running(self) -> int:
        """How many slots are held."""
        return sum(self._running.values())

    def _items_of(self, plan: Plan) -> tuple[QuotaItem, ...]:
        if len(self._items) >= MOST_PLANS:
            self._items.clear()
        items = self._items[plan] = tuple(QuotaItem(quota) for quota in plan.quotas)
        return items

    def _fits(self, quota: Quota, key: str) -> bool:
        if quota.strategy is Strategy.SLIDING:
            previous, current, left = self._counts(quota, key)
            limit = quota.amount - quota.need + 1
            return fits(previous, current, limit=limit, window=quota.window, left=left)
        return self._count(quota, key) + quota.need <= quota.amount

    def _standing(self, quota: Quota, key: str, *, fit: bool) -> Standing:
        if quota.strategy is Strategy.SLIDING:
            previous, current, left = self._counts(quota, key)
            return sliding(quota, previous, current, left, fit=fit)
        count, now = self._count(quota, key), self._storage.now()
        if quota.strategy is Strategy.FIXED:
            return fixed(quota, count, left_of(quota.window, now), fit=fit)
        if quota.strategy is Strategy.CONCURRENCY:
            return concurrent(quota, count, fit=fit)
        until = quota.window - now
        grows = self._storage.moment_at(key, 0) + until if count else 0
        place = count + quota.need - quota.amount - 1
        wait = float(quota.window)
        if 0 <= place < count:
            wait = self._storage.moment_at(key, place) + until
        return moving(quota, count, grows, wait, fit=fit)

    def _counts(self, quota: Quota, key: str) -> tuple[int, int, float]:
        previous, _, current, until = self._storage.get_sliding_window(key, quota.window)
        return previous, current, until - quota.window

    def _count(self, quota: Quota, key: str) -> int:
        if quota.strategy is Strategy.CONCURRENCY:
            return self._running.get(key, 0)
        if quota.strategy is Strategy.MOVING:
            return self._storage.get_moving_window(key, quota.amount, quota.window)[1]
        return self._storage.get(key)
