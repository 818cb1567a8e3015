"""How much a caller may ask for: rates per partition, in process, written in slowapi's notation.

Decides before a body is read; a refused request spends nothing. Memory is bounded whoever calls.
"""

import math
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final, NoReturn

import limits
from limits.storage import Storage
from limits.storage.base import SlidingWindowCounterSupport
from slowapi import Limiter

from proxy.errors import RateExceeded
from proxy.model import Headers

MOST_PARTITIONS: Final = 100_000
_STRATEGY: Final = "sliding-window-counter"


@dataclass(slots=True)
class _Window:
    """Counts of one partition under one policy: this clock-aligned window and the one before."""

    index: int
    current: int
    previous: int


class BoundedMemoryStorage(Storage, SlidingWindowCounterSupport):
    """Sliding windows in a bounded map, the longest unused dropped first; no thread, no lock.

    Replaces limits' MemoryStorage, whose scan thread takes most of a core at 100,000 keys. One event loop
    uses it. The same arithmetic: the previous window's count weighs by what of it still overlaps.
    """

    STORAGE_SCHEME = ["bounded-memory"]  # noqa: RUF012  limits reads it off the class

    def __init__(
        self,
        uri: str | None = None,
        *,
        wrap_exceptions: bool = False,
        most: int = MOST_PARTITIONS,
        clock: Callable[[], float] = time.time,
        **options: float | str | bool,
    ) -> None:
        super().__init__(uri, wrap_exceptions, **options)
        self._most = most
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        now = self._clock()
        window = self._at(key, expiry, now)
        if math.floor(weighted(window.previous, window.current, overlap(now, expiry))) + amount > limit:
            return False
        window.current += amount
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        now = self._clock()
        window = self._at(key, expiry, now)
        left = overlap(now, expiry) * expiry
        return window.previous, left if window.previous else 0.0, window.current, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:  # noqa: ARG002  limits' signature
        self._windows.pop(key, None)

    def _at(self, key: str, expiry: int, now: float) -> _Window:
        index = int(now // expiry)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(index, 0, 0)
            if len(self._windows) > self._most:
                self._windows.popitem(last=False)
            return window
        if window.index != index:
            window.previous = window.current if window.index == index - 1 else 0
            window.current = 0
            window.index = index
        self._windows.move_to_end(key)
        return window

    # The rest of limits' interface, which the sliding window does not use.

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        raise NotImplementedError

    def get(self, key: str) -> int:
        raise NotImplementedError

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        dropped = len(self._windows)
        self._windows.clear()
        return dropped

    def clear(self, key: str) -> None:
        self._windows.pop(key, None)


def _limiter() -> Limiter:
    """Make slowapi's limiter over our storage, reading neither `.env` nor a storage from the environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the null file is not a file is the point of it
        return Limiter(
            key_func=lambda: "",
            storage_uri="bounded-memory://",
            storage_options={},
            strategy=_STRATEGY,
            config_filename=os.devnull,
        )


def overlap(now: float, window: int) -> float:
    """Give the share of the previous window that a window ending `now` (Unix seconds) still covers, 0 to 1."""
    return 1 - (now / window) % 1


def weighted(previous: int, current: int, share: float) -> float:
    """Estimate the requests within the last window: the sliding window counter."""
    return previous * share + current


def seconds_to_room(previous: int, current: int, *, limit: int, window: int, left: float) -> int:
    """Give the whole seconds after which one more request fits, if none comes until then; at least 1.

    `left` is what remains of the current window, in seconds.

    Within this window the previous one's weight must sink below `limit - current`; if `current` alone
    fills the limit, it must itself become the previous one and sink.
    """
    if current < limit:
        wait = left - (limit - current) / max(previous, 1) * window
    else:
        wait = left + window - limit / current * window
    return max(1, math.floor(wait) + 1)


@dataclass(frozen=True, slots=True)
class _Policy:
    name: str
    item: limits.RateLimitItem
    window: int


class RateLimit:
    """One rule for many partitions, `60/minute` or several windows at once; `off` admits everything."""

    def __init__(self, notation: str, name: str, *, legacy_headers: bool = False) -> None:
        limiter = _limiter()
        self._strategy = limiter.limiter
        items = [] if notation == "off" else limits.parse_many(notation)
        single = len(items) == 1
        self._policies = tuple(
            _Policy(name if single else f"{name}-{item.get_expiry()}s", item, item.get_expiry()) for item in items
        )
        self._legacy = legacy_headers
        self._policy_field = (
            b"ratelimit-policy",
            ", ".join(f'"{p.name}";q={p.item.amount};w={p.window}' for p in self._policies).encode(),
        )

    def spend(self, partition: str, cost: int = 1) -> Headers:
        """Charge every policy, or none: give the RateLimit fields, or raise RateExceeded."""
        if not self._policies:
            return []
        if len(self._policies) == 1:
            admitted = self._strategy.hit(self._policies[0].item, partition, cost=cost)
        else:
            admitted = all(self._strategy.test(policy.item, partition, cost=cost) for policy in self._policies)
            for policy in self._policies if admitted else ():
                self._strategy.hit(policy.item, partition, cost=cost)
        if not admitted:
            self._refuse(partition, cost)
        return self.fields(partition)

    def require_room(self, partition: str) -> None:
        """Raise RateExceeded when nothing is left, without charging."""
        if not all(self._strategy.test(policy.item, partition) for policy in self._policies):
            self._refuse(partition, 1)

    def fields(self, partition: str) -> Headers:
        """Give the RateLimit fields (draft-ietf-httpapi-ratelimit-headers) for the partition as it stands."""
        if not self._policies:
            return []
        standings = [(policy, *self._standing(policy, partition)) for policy in self._policies]
        told = ", ".join(f'"{policy.name}";r={remaining};t={reset}' for policy, remaining, reset in standings)
        fields = [self._policy_field, (b"ratelimit", told.encode())]
        if self._legacy:
            policy, remaining, reset = min(standings, key=lambda standing: standing[1])
            legacy = {"limit": policy.item.amount, "remaining": remaining, "reset": int(time.time()) + reset}
            fields += [(f"x-ratelimit-{name}".encode(), str(value).encode()) for name, value in legacy.items()]
        return fields

    def _standing(self, policy: _Policy, partition: str) -> tuple[int, int]:
        """Give what remains and the seconds until it grows: until there is room, or until the window turns."""
        previous, _, current, until = self._window(policy, partition)
        left = until - policy.window
        limit = policy.item.amount
        remaining = limit - math.floor(weighted(previous, current, left / policy.window))
        if remaining <= 0:
            return 0, seconds_to_room(previous, current, limit=limit, window=policy.window, left=left)
        return remaining, math.ceil(left)

    def _window(self, policy: _Policy, partition: str) -> tuple[int, float, int, float]:
        storage = self._strategy.storage
        assert isinstance(storage, BoundedMemoryStorage)  # noqa: S101  chosen by the URI above
        return storage.get_sliding_window(policy.item.key_for(partition), policy.window)

    def _refuse(self, partition: str, cost: int) -> NoReturn:
        violated: list[str] = []
        wait = 1
        for policy in self._policies:
            if not self._strategy.test(policy.item, partition, cost=cost):
                previous, _, current, until = self._window(policy, partition)
                limit = policy.item.amount - cost + 1
                left = until - policy.window
                violated.append(policy.name)
                wait = max(wait, seconds_to_room(previous, current, limit=limit, window=policy.window, left=left))
        raise RateExceeded(policies=tuple(violated), retry_after=wait, fields=self.fields(partition))


def address_partition(address: str) -> str:
    """Give what an address counts as: itself, or its /64 for IPv6 (one subscriber's, RFC 6177)."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "unknown"
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Address(int(parsed) >> 64 << 64)) + "-64"
