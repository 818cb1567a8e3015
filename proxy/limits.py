"""How much a caller may ask for: rates per partition, in process, written in slowapi's notation.

Decides before a body is read; a refused request spends nothing.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any, Final, NoReturn, override

import limits
from slowapi import Limiter

from proxy.errors import RateExceeded
from proxy.model import Headers
from proxy.standings import seconds_to_room, weighted
from proxy.windows import BoundedMemoryStorage

_STRATEGY: Final = "sliding-window-counter"
_REMEMBERED_ADDRESSES: Final = 4096


class QuietLimiter(Limiter):
    """slowapi's limiter, with what it is given and nothing else: not what `.env` or RATELIMIT_… would add."""

    def __init__(self, *, clock: Callable[[], float], strategy: str = _STRATEGY) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the null file is not a file is the point of it
            super().__init__(
                key_func=lambda: "",
                storage_uri="bounded-memory://",
                storage_options={"clock": clock},  # type: ignore[dict-item] # it passes on what it is given
                strategy=strategy,
                config_filename=os.devnull,
            )

    @override
    def get_app_config(self, key: str, default_value: Any = None) -> Any:
        return default_value


@dataclass(frozen=True, slots=True)
class _Policy:
    name: str
    item: limits.RateLimitItem
    window: int


class RateLimit:
    """One rule for many partitions, `60/minute` or several windows at once; `off` admits everything.

    `clock` gives Unix seconds.
    """

    def __init__(
        self, notation: str, name: str, *, legacy_headers: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._strategy = QuietLimiter(clock=clock).limiter
        self._policies = _policies(notation, name)
        self._legacy = legacy_headers
        self._policy_field = (
            b"ratelimit-policy",
            ", ".join(f'"{p.name}";q={p.item.amount};w={p.window}' for p in self._policies).encode(),
        )

    def spend(self, partition: str, cost: int = 1) -> Headers:
        """Charge every policy, or none: give the RateLimit fields, or raise RateExceeded."""
        if not self._policies:
            return []
        with self._one_moment():
            if len(self._policies) == 1:
                admitted = self._strategy.hit(self._policies[0].item, partition, cost=cost)
            else:
                admitted = all(self._strategy.test(policy.item, partition, cost=cost) for policy in self._policies)
                for policy in self._policies if admitted else ():
                    self._strategy.hit(policy.item, partition, cost=cost)
            if not admitted:
                self._refuse(partition, cost)
            return self._fields(partition)

    def require_room(self, partition: str) -> None:
        """Raise RateExceeded when nothing is left, without charging."""
        with self._one_moment():
            if not all(self._strategy.test(policy.item, partition) for policy in self._policies):
                self._refuse(partition, 1)

    def fields(self, partition: str) -> Headers:
        """Give the RateLimit fields (draft-ietf-httpapi-ratelimit-headers) for the partition, without charging."""
        if not self._policies:
            return []
        with self._one_moment():
            return self._fields(partition)

    @contextmanager
    def _one_moment(self) -> Generator[None]:
        storage = self._storage()
        storage.moment = storage.now()
        try:
            yield
        finally:
            storage.moment = None

    def _storage(self) -> BoundedMemoryStorage:
        storage = self._strategy.storage
        assert isinstance(storage, BoundedMemoryStorage)  # noqa: S101  chosen by its URI above
        return storage

    def _fields(self, partition: str) -> Headers:
        standings = [(policy, *self._standing(policy, partition)) for policy in self._policies]
        told = ", ".join(f'"{policy.name}";r={remaining};t={reset}' for policy, remaining, reset in standings)
        fields = [self._policy_field, (b"ratelimit", told.encode())]
        if self._legacy:
            policy, remaining, reset = min(standings, key=lambda standing: standing[1])
            at = math.ceil(self._storage().now()) + reset
            legacy = {"limit": policy.item.amount, "remaining": remaining, "reset": at}
            fields += [(f"x-ratelimit-{name}".encode(), str(value).encode()) for name, value in legacy.items()]
        return fields

    def _standing(self, policy: _Policy, partition: str) -> tuple[int, int]:
        """Give what remains and the seconds until it grows: until there is room, or until the window turns."""
        previous, current, left = self._counts(policy, partition)
        limit = policy.item.amount
        remaining = limit - math.floor(weighted(previous, current, left / policy.window))
        if remaining <= 0:
            return 0, seconds_to_room(previous, current, limit=limit, window=policy.window, left=left)
        return remaining, math.ceil(left)

    def _counts(self, policy: _Policy, partition: str) -> tuple[int, int, float]:
        previous, _, current, until = self._storage().get_sliding_window(policy.item.key_for(partition), policy.window)
        return previous, current, until - policy.window

    def _refuse(self, partition: str, cost: int) -> NoReturn:
        violated: dict[str, int] = {}
        for policy in self._policies:
            if not self._strategy.test(policy.item, partition, cost=cost):
                previous, current, left = self._counts(policy, partition)
                limit = policy.item.amount - cost + 1
                violated[policy.name] = seconds_to_room(previous, current, limit=limit, window=policy.window, left=left)
        raise RateExceeded(policies=tuple(violated), retry_after=max(violated.values()), fields=self._fields(partition))


def _policies(notation: str, name: str) -> tuple[_Policy, ...]:
    """Read a rule; of two amounts for one window the least counts, since it is the one that is felt."""
    items = [] if notation == "off" else limits.parse_many(notation)
    least: dict[int, limits.RateLimitItem] = {}
    for item in items:
        window = item.get_expiry()
        least[window] = item if window not in least else min(item, least[window], key=lambda each: each.amount)
    return tuple(
        _Policy(name if len(least) == 1 else f"{name}-{window}s", item, window) for window, item in least.items()
    )


@lru_cache(_REMEMBERED_ADDRESSES)
def address_partition(address: str) -> str:
    """Give what an address counts as: itself, or its /64 for IPv6 (one subscriber's, RFC 6177)."""
    host, _, port = address.rpartition(":")
    bare = host if port.isdigit() and ("." in host or host.endswith("]")) else address  # some hops write the port too
    try:
        parsed = ip_address(bare.strip("[]"))
    except ValueError:
        return "unknown"
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Address(int(parsed) >> 64 << 64)) + "-64"
