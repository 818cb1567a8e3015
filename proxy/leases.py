"""Leases: what an admitted request holds while its run lasts, and how model tokens are charged to it.

Never waits: what must be told to Redis is left with the tier, which tells it later.
"""

from collections.abc import Sequence
from typing import Protocol

from proxy.model import Headers
from proxy.policies import Plan, Quota, Unit


class Tier(Protocol):
    """Where slots and budgets are counted."""

    def leave(self, key: str, lease: str) -> None:
        """Free the slot of a lease."""

    def charge(self, quota: Quota, key: str, amount: int, *, over: bool) -> bool:
        """Charge tokens, of a run that is `over` or goes on; give whether some are left. Below 0: give back."""


class NoLease:
    """The lease of a request that holds nothing."""

    __slots__ = ("fields",)

    def __init__(self, fields: Headers) -> None:
        self.fields = fields

    def charge(self, tokens: int, *, estimated: bool) -> bool:  # noqa: ARG002  no budget
        return True

    def release(self) -> None:
        """Free nothing."""


class HeldLease:
    """Slots and budgets of one request, in one tier."""

    __slots__ = ("_budgets", "_id", "_over", "_slots", "_tier", "fields")

    def __init__(
        self, fields: Headers, tier: Tier, plan: Plan, *, keys: Sequence[str], fit: Sequence[bool], lease_id: str = ""
    ) -> None:
        self.fields = fields
        self._id = lease_id
        self._tier = tier
        self._over = False
        rows = list(zip(plan.quotas, keys, fit, strict=True))
        self._slots = [key for quota, key, each in rows if each and quota.unit is Unit.RUNS]
        self._budgets = [(quota, key) for quota, key, _ in rows if quota.unit is Unit.TOKENS]

    def charge(self, tokens: int, *, estimated: bool) -> bool:  # noqa: ARG002  an estimate costs as much
        charge, over = self._tier.charge, self._over
        left = [charge(quota, key, tokens, over=over) or quota.shadow for quota, key in self._budgets]
        return all(left)

    def release(self) -> None:
        self._over = True
        slots, self._slots = self._slots, []
        for key in slots:
            self._tier.leave(key, self._id)
