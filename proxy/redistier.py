"""Counts shared by all replicas, on Redis: one round trip for every quota of a request, all charged or none.

What needs no answer (freed slots, charged tokens, renewals) is `outstanding`, told in the background. While Redis does
not do its work this knows; what is decided meanwhile is `admission`'s business.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from proxy.debts import MOST_OWED
from proxy.localtier import LocalTier
from proxy.outages import RedisDown
from proxy.outstanding import CHARGE_SECONDS, Outstanding
from proxy.policies import Plan, Policies, Quota, Strategy, Unit
from proxy.redisclient import Courier, read_script
from proxy.standings import MICROSECONDS, Standing, standing_at
from proxy.tasks import beside

log: Final = logging.getLogger("agentflow_proxy.limits")
FAILURES: Final = 3
"""Failed batches in a row, or failed tellings, after which nobody waits for Redis any more."""
PROBE_SECONDS: Final = 0.5
_PROBE: Final = "s 1000000 1 1 0"


class SharedTier:
    """The counts on Redis, and what this process holds of them.

    `prefix` begins every key. A lease lasts `lease_seconds` unless it is renewed, which it is thrice in that time.
    `local` learns of all that is admitted here, so that it knows this process's part should Redis fail.
    """

    def __init__(
        self,
        courier: Courier,
        local: LocalTier,
        *,
        prefix: str,
        lease_seconds: float,
        without: str,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._courier = courier
        self._local = local
        self._prefix = prefix
        self._lease = int(lease_seconds * MICROSECONDS)
        self._wake_seconds = min(lease_seconds / 12, CHARGE_SECONDS)
        self._without = without
        self._ticks = ticks
        self._admit = read_script("admit")
        self._one_slot = False
        self._outstanding = Outstanding(
            courier, name=self._name, note=self._note_charge, lease_seconds=lease_seconds, ticks=ticks
        )
        self._left: OrderedDict[str, int] = OrderedDict()
        self._down_since: float | None = None
        self._untold = 0
        """Tellings that failed, since the last that did not."""
        self._wake = asyncio.Event()

    @property
    def is_down(self) -> bool:
        """Whether Redis is given up for now."""
        return self._down_since is not None

    def lay_out(self, policies: Policies) -> None:
        """Choose the keys' slots: a script's must be in one, so that where principals count together all are in one."""
        self._one_slot = self._courier.is_cluster and not policies.is_per_principal

    async def decide(self, plan: Plan, keys: Sequence[str], lease: str) -> tuple[bool, list[Standing]]:
        """Charge every quota or none, and hold the slots under the id `lease`. Raises RedisDown."""
        try:
            answer = await self._ask(map(self._name, keys), "take", lease, plan.spec)
        except RedisDown as problem:
            self._doubt(plan, keys, lease)
            self._note_failure(problem.reason, at_once=problem.answered)
            raise
        except asyncio.CancelledError:
            self._doubt(plan, keys, lease)
            raise
        admitted, standings = self._read(plan, answer)
        for quota, key, standing in zip(plan.quotas, keys, standings, strict=True):
            if quota.unit is Unit.TOKENS:
                self._know(key, standing.remaining)
            elif admitted and standing.fits:
                self._local.note(quota, key)
                if quota.unit is Unit.RUNS:
                    self._outstanding.hold(key, lease)
        return admitted, standings

    async def peek(self, plan: Plan, keys: Sequence[str]) -> list[Standing]:
        """Say how each quota stands, without charging. Raises RedisDown."""
        return self._read(plan, await self._ask(map(self._name, keys), "peek", "", plan.spec))[1]

    async def forget(self, keys: Sequence[str]) -> int:
        """Forget counts; give of how many quotas there were any. Raises RedisDown."""
        return await self._courier.delete([self._name(key) for key in keys])

    def hold(self, key: str, lease: str) -> None:
        """Hold a slot that was taken without Redis, and tell it."""
        self._outstanding.claim(key, lease)

    def leave(self, key: str, lease: str) -> None:
        """Free a slot."""
        self._local.leave(key)
        if self._down_since is None or self._ticks() - self._down_since < self._lease / MICROSECONDS:
            self._outstanding.free(key, lease)
        else:
            self._outstanding.drop(key, lease)
        self._wake.set()

    def owe(self, quota: Quota, key: str, amount: int) -> None:
        """Charge later what was used without asking."""
        self._outstanding.owe(quota, key, amount)

    def charge(self, quota: Quota, key: str, amount: int, *, over: bool = False) -> bool:
        """Charge what was used already; give whether something is left, as far as this process knows.

        When the run is `over` Redis is told at once, or else with what comes in the next half second.
        """
        self._outstanding.owe(quota, key, amount, over=over)
        if over:
            self._wake.set()
        has_left = self._local.charge(quota, key, amount, over=over)
        if self.is_down:
            return has_left
        left = self._left.get(key)
        if left is None:
            return True
        self._left[key] = left - amount
        return left > amount

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Tell Redis what it must know, as long as the context lasts."""
        await self._tell(try_first=True)
        try:
            async with beside(self._watch()):
                yield
        finally:
            with suppress(RedisDown):
                await self._outstanding.settle(everything=True)
            await self._courier.close()

    async def reach(self) -> None:
        """Have a connection, before the first decision is timed. Raises RedisDown."""
        await self._courier.reach()

    async def close(self) -> None:
        """Close the connections."""
        await self._courier.close()

    async def _watch(self) -> None:
        while True:
            if self.is_down:
                await asyncio.sleep(PROBE_SECONDS)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._wake_seconds):
                        await self._wake.wait()
            self._wake.clear()
            try:
                await self._tell()
            except Exception as error:  # noqa: BLE001  the edge of this task: dead, leases would run out
                self._lose(type(error).__name__)

    async def _tell(self, *, try_first: bool = False) -> None:
        """Tell what is due; while Redis is given up, try it first, and take it back when everything is told."""
        try:
            if self.is_down:
                await self._courier.disconnect()
            if self.is_down or try_first:
                await self._courier.reach()
                for probe in [self._name("{probe}")] if self._one_slot else self._courier.probes(f"{self._prefix}:"):
                    await self._ask([probe], "take", "probe", _PROBE)
            await self._outstanding.tell(everything=self.is_down)
            if self.is_down:
                await self._outstanding.tell(everything=True)  # what was admitted during the long one
                self._recover()
                await self._outstanding.tell(everything=True)
        except RedisDown as problem:
            self._untold += 1
            self._note_failure(problem.reason, at_once=try_first or problem.answered or self._untold >= FAILURES)
            return
        self._untold = 0

    def _recover(self) -> None:
        seconds = round(self._ticks() - (self._down_since or 0), 3)
        self._down_since = None
        log.warning("limits.recovered", extra={"fields": {"down_seconds": seconds}})

    async def _ask(self, names: Iterable[str], mode: str, lease: str, spec: str) -> str:
        arguments = (mode, self._courier.not_after, lease, self._lease, spec)
        return await self._courier.run(self._admit, list(names), arguments)

    def _read(self, plan: Plan, answer: str) -> tuple[bool, list[Standing]]:
        admitted, now, *told = map(int, answer.split())
        self._courier.note_time(now)
        standings = [standing_at(quota, now, told[4 * at : 4 * at + 4]) for at, quota in enumerate(plan.quotas)]
        return bool(admitted), standings

    def _name(self, key: str) -> str:
        return f"{{{self._prefix}}}:{key}" if self._one_slot else f"{self._prefix}:{key}"

    def _know(self, key: str, remaining: int) -> None:
        self._left[key] = remaining - self._outstanding.debts.amount(key)
        self._left.move_to_end(key)
        if len(self._left) > MOST_OWED:
            self._left.popitem(last=False)

    def _note_charge(self, quota: Quota, key: str, answer: str) -> None:
        now, current, previous = map(int, answer.split())
        if quota.unit is Unit.TOKENS:
            self._know(key, standing_at(quota, now, (1, current, previous, 0)).remaining)

    def _doubt(self, plan: Plan, keys: Sequence[str], lease: str) -> None:
        """Free slots that may have been taken, though nobody heard of it."""
        for quota, key in zip(plan.quotas, keys, strict=True):
            if quota.strategy is Strategy.CONCURRENCY:
                self._outstanding.free(key, lease)
                self._wake.set()

    def _note_failure(self, reason: str, *, at_once: bool = False) -> None:
        self._outstanding.doubt()
        if at_once or self._courier.failures >= FAILURES:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self._outstanding.doubt()
        if self._down_since is None:
            self._down_since = self._ticks()
            self._wake.set()
            log.error("limits.degraded", extra={"fields": {"reason": reason, "policy": self._without}})
