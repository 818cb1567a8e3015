"""Places for what lasts long without a run: so many in this process, and so many of them for one caller.

Pure. Counted in each process; what takes a place decides nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from proxy.errors import RateExceeded
from proxy.outages import PoolExhausted


@dataclass(slots=True)
class Places:
    """At most `most` are taken at once, at most `per_caller` of them by one caller; `policy` names that on the wire."""

    most: int
    per_caller: int
    policy: str
    taken: int = field(default=0, init=False)
    _by_caller: dict[str, int] = field(default_factory=dict, init=False)

    @contextmanager
    def one(self, caller: str) -> Iterator[None]:
        """Hold a place. Raises RateExceeded when the caller has his share, PoolExhausted when all are taken."""
        held = self._by_caller.get(caller, 0)
        if held >= self.per_caller:
            raise RateExceeded(policies=(self.policy,), retry_after=1, fields=[])
        if self.taken >= self.most:
            raise PoolExhausted
        self.taken += 1
        self._by_caller[caller] = held + 1
        try:
            yield
        finally:
            self.taken -= 1
            left = self._by_caller.pop(caller) - 1
            if left:
                self._by_caller[caller] = left
