"""What Redis is still to be told: slots that are held and freed, and charges. Told in the background, some at once.

Decides nothing, and forgets nothing that could not be told: it is told next time.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import batched, chain
from typing import Final

from proxy.debts import Debts
from proxy.policies import Quota
from proxy.redisclient import Courier, read_script
from proxy.standings import MICROSECONDS

CHARGE_SECONDS: Final = 0.5
"""Between two charges of a run that goes on; what one has used that ended is charged at once."""
MOST_IDS: Final = 1_000
AT_ONCE: Final = 50
"""Of what is told: a decision waits behind no more than these."""


class Outstanding:
    """What one process has to tell. `name` gives the name on Redis of a key, `note` is called for what was charged.

    A lease lasts `lease_seconds` unless it is renewed, which it is thrice in that time.
    """

    def __init__(
        self,
        courier: Courier,
        *,
        name: Callable[[str], str],
        note: Callable[[Quota, str, str], None],
        lease_seconds: float,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._courier = courier
        self._name = name
        self._note = note
        self._lease = int(lease_seconds * MICROSECONDS)
        self._renew_seconds = lease_seconds / 3
        self._ticks = ticks
        self._settle, self._renew, self._release = map(read_script, ("settle", "renew", "release"))
        self._held: dict[str, set[str]] = {}
        self._freed: dict[str, set[str]] = {}
        self._over: set[str] = set()
        """Keys under which a run that has ended owes something."""
        self._renewed, self._paid = ticks(), ticks()
        self._nonce, self._number = secrets.token_hex(8), 0
        self.debts = Debts()

    def hold(self, key: str, lease: str) -> None:
        """Hold a slot that Redis has given."""
        self._held.setdefault(key, set()).add(lease)

    def claim(self, key: str, lease: str) -> None:
        """Hold a slot that was taken without Redis, which may know of it or not."""
        self.hold(key, lease)
        self._freed.get(key, set()).discard(lease)  # what was in doubt is held after all
        self.doubt()

    def doubt(self) -> None:
        """Renew every lease next time: who knows what Redis still knows."""
        self._renewed = -math.inf

    def free(self, key: str, lease: str) -> None:
        """Free a slot, whether it is held or nobody knows."""
        self.drop(key, lease)
        self._freed.setdefault(key, set()).add(lease)

    def drop(self, key: str, lease: str) -> None:
        """Hold a slot no longer, which Redis has forgotten by itself."""
        leases = self._held.get(key, set())
        leases.discard(lease)
        if not leases:
            self._held.pop(key, None)

    def owe(self, quota: Quota, key: str, amount: int, *, over: bool = False) -> None:
        """Charge later what was used without asking; soon if the run is `over`."""
        self.debts.owe(quota, key, amount, self._ticks())
        if over:
            self._over.add(key)

    async def tell(self, *, everything: bool = False) -> None:
        """Tell what is due, and with `everything` all charges too. Raises RedisDown."""
        await _each(chain(self._renewals(), self._settlements(everything=everything)))

    async def settle(self, *, everything: bool) -> None:
        """Free what has ended, and charge what is owed, for runs that go on now and then only. Raises RedisDown."""
        await _each(self._settlements(everything=everything))

    def _renewals(self) -> Iterable[Awaitable[None]]:
        """When it is time, renew every lease that is held: those Redis has lost as well."""
        if self._ticks() - self._renewed < self._renew_seconds:
            return ()
        self._renewed = self._ticks()  # what is claimed from now on is told next time
        return map(self._renew_at, list(self._held))

    def _settlements(self, *, everything: bool) -> Iterable[Awaitable[None]]:
        over, self._over = self._over, set()
        if everything or self._ticks() - self._paid >= CHARGE_SECONDS:
            over, self._paid = set(self.debts.keys()), self._ticks()
        return chain(map(self._release_at, list(self._freed)), map(self._charge_at, over))

    async def _renew_at(self, key: str) -> None:
        for ids in batched(list(self._held.get(key, ())), MOST_IDS, strict=False):
            await self._courier.run(self._renew, [self._name(key)], [self._courier.not_after, self._lease, *ids])

    async def _release_at(self, key: str) -> None:
        leases = self._freed.pop(key, set())
        try:
            for ids in batched(leases, MOST_IDS, strict=False):
                await self._courier.run(self._release, [self._name(key)], ids)
        except BaseException:
            self._freed.setdefault(key, set()).update(leases - self._held.get(key, set()))
            raise

    async def _charge_at(self, key: str) -> None:
        """Charge each thing as of when it was used."""
        debt = self.debts.take(key, self._ticks())
        if debt is None:
            return
        self._number += 1
        identity, parts = f"{self._nonce}{self._number:x}", debt.arguments(self._ticks())
        arguments = [self._courier.not_after, debt.quota.strategy[0], debt.quota.window, identity, *parts]
        try:
            answer = await self._courier.run(self._settle, [self._name(key)], arguments)
        except BaseException:
            self.debts.put_back(key, debt)
            raise
        self._note(debt.quota, key, answer)


async def _each(told: Iterable[Awaitable[None]]) -> None:
    """Wait for some of it at once. Raises what was raised first: at the end, or when nothing of some could be told.

    So what one node of a cluster does not take is kept from no other, and Redis that is gone is not asked for each.
    """
    failure: BaseException | None = None
    for some in batched(told, AT_ONCE, strict=False):
        failures = [each for each in await asyncio.gather(*some, return_exceptions=True) if each is not None]
        failure = failure or (failures[0] if failures else None)
        if len(failures) == len(some):
            break
    if failure is not None:
        raise failure
