"""What is still to be charged to quotas, and how long ago each part of it was used: so that it can be charged then.

Pure. Bounded: so many keys, and for each a few parts of two windows; what no window counts any more is forgotten.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from proxy.policies import Quota, Strategy
from proxy.standings import MICROSECONDS

MOST_OWED: Final = 100_000
_PARTS: Final = 4
"""Of a window: what is used within one part of it is charged together, as of its latest use."""


@dataclass(slots=True)
class Part:
    """An amount, and when some of it was used last (seconds of the monotonic clock)."""

    amount: int
    at: float


@dataclass(slots=True)
class Debt:
    """All that is owed to one quota, the oldest first."""

    quota: Quota
    parts: deque[Part] = field(default_factory=deque)

    @property
    def amount(self) -> int:
        """How much that is, whenever it was used."""
        return sum(part.amount for part in self.parts)

    def add(self, amount: int, at: float) -> None:
        """Take in what was used at `at`, which is not before what was taken in last."""
        span = self.quota.window / _PARTS
        if self.parts and self.parts[-1].at // span == at // span:
            self.parts[-1].amount += amount
            self.parts[-1].at = at
        else:
            self.parts.append(Part(amount, at))
        self.forget(at)

    def forget(self, now: float) -> None:
        """Drop what counts in no window any more; a sliding one counts the one before as well."""
        counts = self.quota.window * (2 if self.quota.strategy is Strategy.SLIDING else 1)
        while self.parts and now - self.parts[0].at >= counts:
            self.parts.popleft()

    def arguments(self, now: float) -> list[str | int]:
        """Write the parts for `settle.lua`: each amount, and how long ago it was used, in microseconds."""
        most = self.quota.amount if self.quota.strategy is Strategy.MOVING else self.amount
        told = [(min(part.amount, most), int((now - part.at) * MICROSECONDS)) for part in self.parts]
        return [number for pair in told for number in pair]


class Debts:
    """What is owed, by key; what would be the key too many is not kept."""

    def __init__(self) -> None:
        self._owed: dict[str, Debt] = {}

    def owe(self, quota: Quota, key: str, amount: int, at: float) -> None:
        """Charge later what was used at `at`."""
        debt = self._owed.get(key)
        if debt is None:
            if len(self._owed) >= MOST_OWED:
                return
            debt = self._owed[key] = Debt(quota)
        debt.add(amount, at)

    def amount(self, key: str) -> int:
        """Give what is owed under a key."""
        debt = self._owed.get(key)
        return debt.amount if debt is not None else 0

    def keys(self) -> list[str]:
        """Give the keys under which something is owed."""
        return list(self._owed)

    def take(self, key: str, now: float) -> Debt | None:
        """Give what is owed under a key, and owe it no longer; None where that is nothing, or no window counts it."""
        debt = self._owed.pop(key, None)
        if debt is not None:
            debt.forget(now)
        return debt if debt is not None and debt.parts else None

    def put_back(self, key: str, debt: Debt) -> None:
        """Owe again what could not be charged; what was owed meanwhile is later."""
        later = self._owed.get(key)
        if later is not None:
            debt.parts.extend(later.parts)
        self._owed[key] = debt
