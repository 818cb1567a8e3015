"""Counts shared by all replicas, on Redis: one round trip for every quota of a request, all charged or none.

What needs no answer (freed slots, charged tokens, renewals) is told in the background, in order. While Redis does not
do its work this knows, and keeps what is to be told; what is decided meanwhile is `admission`'s business.
"""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from proxy.debts import MOST_OWED, Debts
from proxy.localtier import LocalTier
from proxy.outages import RedisDown
from proxy.policies import Plan, Policies, Quota, Strategy, Unit
from proxy.redisclient import Courier, Script, read_script
from proxy.standings import MICROSECONDS, Standing, standing_at

log: Final = logging.getLogger("agentflow_proxy.limits")
FAILURES: Final = 3
"""Failed batches in a row after which nobody waits for Redis any more."""
PROBE_SECONDS: Final = 0.5
CHARGE_SECONDS: Final = 0.5
"""Between two charges of a run that goes on; what one has used that ended is charged at once."""
MOST_IDS: Final = 1_000
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
        self._renew_seconds = lease_seconds / 3
        self._without = without
        self._ticks = ticks
        self._admit, self._settle, self._renew, self._release = map(
            read_script, ("admit", "settle", "renew", "release")
        )
        self._one_slot = False
        self._held: dict[str, set[str]] = {}
        self._freed: dict[str, set[str]] = {}
        self._debts = Debts()
        self._over: set[str] = set()
        """Keys under which a run that has ended owes something."""
        self._paid = ticks()
        self._left: OrderedDict[str, int] = OrderedDict()
        self._down_since: float | None = None
        self._renewed = ticks()
        self._wake = asyncio.Event()
        self._nonce, self._number = secrets.token_hex(8), 0

    @property
    def is_down(self) -> bool:
        """Whether Redis is given up for now."""
        return self._down_since is not None

    def lay_out(self, policies: Policies) -> None:
        """Choose the keys' slots: a script's must be in one, so that where principals count together all are in one."""
        self._one_slot = self._courier.is_cluster and not policies.is_per_principal

    async def decide(self, plan: Plan, keys: Sequence[str], lease: str) -> tuple[bool, list[Standing]]:
        """Charge every quota or none, and hold the slots under the id `lease`. Raises RedisDown."""
        names = self._names(keys)
        try:
            answer = await self._ask(names, "take", lease, plan.spec)
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
                    self.hold(key, lease)
        return admitted, standings

    async def peek(self, plan: Plan, keys: Sequence[str]) -> list[Standing]:
        """Say how each quota stands, without charging. Raises RedisDown."""
        return self._read(plan, await self._ask(self._names(keys), "peek", "", plan.spec))[1]

    async def forget(self, keys: Sequence[str]) -> int:
        """Forget counts; give of how many quotas there were any. Raises RedisDown."""
        return await self._courier.delete(self._names(keys))

    def hold(self, key: str, lease: str) -> None:
        """Hold a slot on Redis from the next renewal on, whether it was taken there or not."""
        self._held.setdefault(key, set()).add(lease)
        self._freed.get(key, set()).discard(lease)  # what was in doubt is held after all

    def leave(self, key: str, lease: str) -> None:
        """Free a slot."""
        self._local.leave(key)
        leases = self._held.get(key, set())
        leases.discard(lease)
        if not leases:
            self._held.pop(key, None)
        if self._down_since is None or self._ticks() - self._down_since < self._lease / MICROSECONDS:
            self._freed.setdefault(key, set()).add(lease)  # after that Redis has forgotten it by itself
        self._wake.set()

    def owe(self, quota: Quota, key: str, amount: int) -> None:
        """Charge later what was used without asking."""
        self._debts.owe(quota, key, amount, self._ticks())

    def charge(self, quota: Quota, key: str, amount: int, *, over: bool = False) -> bool:
        """Charge what was used already; give whether something is left, as far as this process knows.

        When the run is `over` Redis is told at once, or else with what comes in the next half second.
        """
        self.owe(quota, key, amount)
        if over:
            self._over.add(key)
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
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            with suppress(RedisDown):
                await self._free()
                await self._pay(everything=True)
            await self._courier.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._courier.close()

    async def _watch(self) -> None:
        while True:
            if self.is_down:
                await asyncio.sleep(PROBE_SECONDS)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(self._renew_seconds / 4, CHARGE_SECONDS)):
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
                await self._ask([f"{self._prefix}:{{probe}}"], "take", "probe", _PROBE)
            if self.is_down or self._ticks() - self._renewed >= self._renew_seconds:
                await self._hold_on()
            await self._free()
            await self._pay(everything=self.is_down)
        except RedisDown as problem:
            self._note_failure(problem.reason, at_once=try_first or problem.answered)
            return
        if self._down_since is not None:
            seconds = round(self._ticks() - self._down_since, 3)
            self._down_since = None
            log.warning("limits.recovered", extra={"fields": {"down_seconds": seconds}})

    async def _hold_on(self) -> None:
        """Renew every lease that is held: those Redis has lost as well."""
        for key, leases in list(self._held.items()):
            ids = list(leases)
            for start in range(0, len(ids), MOST_IDS):
                arguments: list[str | int] = [self._courier.not_after, self._lease, *ids[start : start + MOST_IDS]]
                await self._run(self._renew, key, arguments)
        self._renewed = self._ticks()

    async def _free(self) -> None:
        freed, self._freed = self._freed, {}
        while freed:
            key, leases = next(iter(freed.items()))
            try:
                ids = list(leases)
                for start in range(0, len(ids), MOST_IDS):
                    await self._courier.run(self._release, self._names([key]), ids[start : start + MOST_IDS])
            except BaseException:
                for other, rest in freed.items():
                    self._freed.setdefault(other, set()).update(rest)
                raise
            del freed[key]

    async def _pay(self, *, everything: bool) -> None:
        """Charge what is owed: each thing as of when it was used, and for runs that go on now and then only."""
        over, self._over = self._over, set()
        if everything or self._ticks() - self._paid >= CHARGE_SECONDS:
            over, self._paid = set(self._debts.keys()), self._ticks()
        for key in over:
            debt = self._debts.take(key, self._ticks())
            if debt is None:
                continue
            quota = debt.quota
            self._number += 1
            identity = f"{self._nonce}{self._number:x}"
            parts = debt.arguments(self._ticks())
            try:
                arguments = [self._courier.not_after, quota.strategy[0], quota.window, identity, *parts]
                answer = await self._run(self._settle, key, arguments)
            except BaseException:
                self._debts.put_back(key, debt)
                raise
            now, current, previous = map(int, answer.split())
            if quota.unit is Unit.TOKENS:
                told = (1, current, previous, 0)
                self._know(key, standing_at(quota, now, told).remaining)

    async def _run(self, script: Script, key: str, arguments: list[str | int]) -> str:
        answer = await self._courier.run(script, self._names([key]), arguments)
        if answer == "late":
            self._courier.forget_time()
            raise RedisDown("late")
        return answer

    async def _ask(self, names: Sequence[str], mode: str, lease: str, spec: str) -> str:
        answer = await self._courier.run(self._admit, names, (mode, self._courier.not_after, lease, self._lease, spec))
        if answer == "late":
            self._courier.forget_time()
            raise RedisDown("late")
        return answer

    def _read(self, plan: Plan, answer: str) -> tuple[bool, list[Standing]]:
        admitted, now, *told = map(int, answer.split())
        self._courier.note_time(now)
        standings = [standing_at(quota, now, told[4 * at : 4 * at + 4]) for at, quota in enumerate(plan.quotas)]
        return bool(admitted), standings

    def _names(self, keys: Sequence[str]) -> list[str]:
        prefix = f"{{{self._prefix}}}:" if self._one_slot else f"{self._prefix}:"
        return [prefix + key for key in keys]

    def _know(self, key: str, remaining: int) -> None:
        self._left[key] = remaining - self._debts.amount(key)
        self._left.move_to_end(key)
        if len(self._left) > MOST_OWED:
            self._left.popitem(last=False)

    def _doubt(self, plan: Plan, keys: Sequence[str], lease: str) -> None:
        """Free slots that may have been taken, though nobody heard of it."""
        for quota, key in zip(plan.quotas, keys, strict=True):
            if quota.strategy is Strategy.CONCURRENCY:
                self._freed.setdefault(key, set()).add(lease)
                self._wake.set()

    def _note_failure(self, reason: str, *, at_once: bool = False) -> None:
        self._renewed = 0  # who knows what Redis still knows
        if at_once or self._courier.failures >= FAILURES:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if self._down_since is None:
            self._down_since = self._ticks()
            self._wake.set()
            log.error("limits.degraded", extra={"fields": {"reason": reason, "policy": self._without}})
