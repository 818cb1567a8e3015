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
from proxy.windows import Counts


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
        quotas = plan.quotas
        now = self._storage.moment = self._clock()
        try:
            if len(quotas) == 1 and quotas[0].strategy is Strategy.SLIDING and quotas[0].cost and not quotas[0].shadow:
                items = self._items.get(plan) or self._items_of(plan)
                admitted = self._hit_sliding(items[0], keys[0], cost=quotas[0].cost)
                after = self._storage.at(keys[0], quotas[0].window, now)
                return admitted, [self._standing(quotas[0], keys[0], after, now, fit=admitted)]
            seen = [self._see(quota, key, now) for quota, key in zip(quotas, keys, strict=True)]
            admitted = all(fit or quota.shadow for quota, (fit, _) in zip(quotas, seen, strict=True))
            if admitted:
                for quota, key, (fit, counts) in zip(quotas, keys, seen, strict=True):
                    if fit and quota.cost:
                        if counts is not None:
                            counts.current += quota.cost
                        else:
                            self.note(quota, key)
            told = zip(quotas, keys, seen, strict=True)
            return admitted, [self._standing(quota, key, counts, now, fit=fit) for quota, key, (fit, counts) in told]
        finally:
            self._storage.moment = None

    def peek(self, plan: Plan, keys: Sequence[str]) -> list[Standing]:
        """Say how each quota stands, without charging."""
        now = self._storage.moment = self._clock()
        try:
            told = [(quota, key, *self._see(quota, key, now)) for quota, key in zip(plan.quotas, keys, strict=True)]
            return [self._standing(quota, key, counts, now, fit=fit) for quota, key, fit, counts in told]
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
        return self._see(quota, key, self._clock())[0]

    @property
    def running(self) -> int:
        """How many slots are held."""
        return sum(self._running.values())

    def _items_of(self, plan: Plan) -> tuple[QuotaItem, ...]:
        if len(self._items) >= MOST_PLANS:
            self._items.clear()
        items = self._items[plan] = tuple(QuotaItem(quota) for quota in plan.quotas)
        return items

    def _see(self, quota: Quota, key: str, now: float) -> tuple[bool, Counts | None]:
        """Say whether a request fits, and give the counts where they are a window's: read once, since it is costly."""
        need, strategy = quota.cost or 1, quota.strategy
        if strategy is Strategy.SLIDING:
            window = quota.window
            counts = self._storage.at(key, window, now)
            limit, left = quota.amount - need + 1, left_of(window, now)
            return fits(counts.previous, counts.current, limit=limit, window=window, left=left), counts
        if strategy is Strategy.FIXED:
            counts = self._storage.at(key, quota.window, now)
            return counts.current + need <= quota.amount, counts
        return self._count(quota, key) + need <= quota.amount, None

    def _standing(self, quota: Quota, key: str, counts: Counts | None, now: float, *, fit: bool) -> Standing:
        if counts is not None:
            left = left_of(quota.window, now)
            if quota.strategy is Strategy.FIXED:
                return fixed(quota, counts.current, left, fit=fit)
            return sliding(quota, counts.previous, counts.current, left, fit=fit)
        count = self._count(quota, key)
        if quota.strategy is Strategy.CONCURRENCY:
            return concurrent(quota, count, fit=fit)
        until = quota.window - now
        grows = self._storage.moment_at(key, 0) + until if count else 0
        place = count + quota.need - quota.amount - 1
        wait = float(quota.window)
        if 0 <= place < count:
            wait = self._storage.moment_at(key, place) + until
        return moving(quota, count, grows, wait, fit=fit)

    def _count(self, quota: Quota, key: str) -> int:
        if quota.strategy is Strategy.CONCURRENCY:
            return self._running.get(key, 0)
        return self._storage.get_moving_window(key, quota.amount, quota.window)[1]
