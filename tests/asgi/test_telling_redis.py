"""What one process still has to tell Redis: what cannot be told holds up nothing else."""

from collections.abc import Sequence
from typing import cast

import pytest

from proxy.outages import RedisDown
from proxy.outstanding import Outstanding
from proxy.policies import Policies, Policy
from proxy.redisclient import Courier, Script


class OneDeaf:
    """A courier to a cluster of which one master is gone, the one with the key `gone`."""

    not_after = 0

    def __init__(self) -> None:
        self.told: list[str] = []

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> str:
        del script, arguments
        if keys[0] == "gone":
            raise RedisDown("gone")
        self.told.append(keys[0])
        return "0 0 0"


def telling(courier: OneDeaf, ticks: list[float]) -> Outstanding:
    """Make what tells this courier, at the last of these times."""
    return Outstanding(
        cast("Courier", courier), name=str, note=lambda *_: None, lease_seconds=60, ticks=lambda: ticks[-1]
    )


async def test_a_slot_that_cannot_be_freed_holds_up_no_charge() -> None:
    """The others' masters are told what they must know, at the end of the process too."""
    courier = OneDeaf()
    outstanding = telling(courier, [1000.0])
    policy = Policy(name="tokens", rates=((10, 60),))
    [quota] = Policies([policy], read_rates=lambda _: ()).plan("invoke").quotas
    outstanding.free("gone", "lease")
    outstanding.owe(quota, "here", 5)

    with pytest.raises(RedisDown):
        await outstanding.settle(everything=True)

    assert courier.told == ["here"]


async def test_a_slot_that_cannot_be_renewed_holds_up_no_freed_one() -> None:
    """Who waits for a slot on another master gets it, although the renewals come first and fail."""
    courier, ticks = OneDeaf(), [1000.0]
    outstanding = telling(courier, ticks)
    outstanding.hold("gone", "held")
    outstanding.free("here", "freed")
    ticks.append(1000.0 + 60)

    with pytest.raises(RedisDown):
        await outstanding.tell()

    assert courier.told == ["here"]
