"""How many credentials that prove nothing may come from one address: counted in each process, before anybody is known.

An address is what one subscriber has. Decides nothing about credentials.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final

from proxy.localtier import LocalTier
from proxy.policies import Policies, Policy, Rate
from proxy.standings import Standing, fields_of, refusal

_REMEMBERED_ADDRESSES: Final = 4096


class Failures:
    """The policy `failures`, counted per address; without `rates` it refuses nobody. `clock` gives Unix seconds."""

    def __init__(self, rates: Sequence[Rate], *, clock: Callable[[], float] = time.time) -> None:
        policy = Policy(name="failures", rates=tuple(rates))
        self._plan = Policies([policy], read_rates=lambda _: ()).plan("authentication")
        self._tier = LocalTier(clock=clock)

    def spend(self, address: str) -> None:
        """Charge every window, or none. Raises RateExceeded."""
        admitted, standings = self._tier.decide(self._plan, self._keys(address))
        if not admitted:
            self._refuse(standings)

    def require_room(self, address: str) -> None:
        """Raise RateExceeded when nothing is left of a window; charge nothing."""
        standings = self._tier.peek(self._plan, self._keys(address))
        if not all(standing.fits for standing in standings):
            self._refuse(standings)

    def _keys(self, address: str) -> list[str]:
        partition = address_partition(address)
        return [f"{partition} {quota.key}" for quota in self._plan.quotas]

    def _refuse(self, standings: Sequence[Standing]) -> None:
        raise refusal(self._plan, standings, fields_of(self._plan, standings))


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
