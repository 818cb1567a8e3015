"""When a proxy has too much to do, whose work is refused first, and how that begins and ends.

The clock is a number, and the loop is as late as a test says; the last test has a real one.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.environment import load
from proxy.outages import ReducedCapacity
from proxy.overload import CALM_SECONDS, PROBE_SECONDS, Overload, Thresholds

TIERS = ("bronze", "default", "gold")


@dataclass
class Clock:
    """Seconds that pass when told to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def refused(overload: Overload, tier: str) -> bool:
    """Say whether new work of this tier is refused."""
    try:
        overload.require_room(tier)
    except ReducedCapacity:
        return True
    return False


@pytest.mark.parametrize(
    ("runs", "without_room"),
    [
        (79, ()),
        (80, ("bronze", "unheard-of")),
        (90, ("bronze", "default", "unheard-of")),
        (100, (*TIERS, "unheard-of")),
    ],
)
def test_open_runs_cost_the_lowest_tier_its_room_first(runs: int, without_room: tuple[str, ...]) -> None:
    """Of a hundred runs the highest tier may open the hundredth, each lower one ends a tenth earlier."""
    overload = Overload(Thresholds(open_runs=100, tiers=TIERS))
    overload.open_runs = runs

    assert {tier for tier in (*TIERS, "unheard-of") if refused(overload, tier)} == set(without_room)


@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 6))
def test_a_higher_tier_never_has_less_room(runs: int, most: int, tiers: int) -> None:
    """Whatever the numbers: who is refused, everybody below is; the highest gets all; one run is always possible."""
    names = [str(number) for number in range(tiers)]
    overload = Overload(Thresholds(open_runs=most, tiers=names))
    overload.open_runs = runs

    outcomes = [refused(overload, name) for name in names]

    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes[-1] == (runs >= most)
    assert runs > 0 or not any(outcomes)


def test_a_late_loop_is_an_overload_when_it_stays_late() -> None:
    """One turn that is four times too late refuses nobody; a loop that is twice too late does within a second."""
    overload = Overload(Thresholds(loop_lag=0.1))

    overload.note_turn(0.4)
    once = refused(overload, "default")
    for _ in range(20):
        overload.note_turn(0.0)
    turns = 0
    while not refused(overload, "default"):
        overload.note_turn(0.2)
        turns += 1

    assert not once
    assert turns * PROBE_SECONDS < 1


def test_no_thresholds_refuse_nobody() -> None:
    """As it stands nothing is refused, however late the loop is and whatever is open."""
    overload = Overload(Thresholds())
    overload.open_runs = 10**6
    overload.note_turn(3600)

    assert not refused(overload, "default")


def test_an_overload_begins_and_ends_once(caplog: pytest.LogCaptureFixture) -> None:
    """A threshold that is reached, left and reached again within moments is one overload, with one line each."""
    clock = Clock()
    overload = Overload(Thresholds(open_runs=2), ticks=clock)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            overload.open_runs = 2
            assert refused(overload, "default")
            overload.open_runs = 1
            assert not refused(overload, "default")
            clock.now += CALM_SECONDS - 1
            overload.note_turn(0)
        clock.now += 1
        overload.note_turn(0)
        overload.note_turn(0)

    told = [(record.getMessage(), record.fields) for record in caplog.records]  # type: ignore[attr-defined]  # ours
    assert told == [
        ("overload.began", {"measure": "open runs", "loop_lag_ms": 0, "open_runs": 2}),
        ("overload.ended", {"seconds": 2 * (CALM_SECONDS - 1), "refused": 3}),
    ]


def test_who_is_refused_is_told_when_to_come_again() -> None:
    """The lower the tier, the later, so that those above find room first; the log says what was too much."""
    overload = Overload(Thresholds(open_runs=1, tiers=TIERS))
    overload.open_runs = 1

    for tier, seconds in (("gold", b"1"), ("default", b"2"), ("bronze", b"3"), ("unheard-of", b"3")):
        with pytest.raises(ReducedCapacity) as raised:
            overload.require_room(tier)
        assert raised.value.headers() == [(b"retry-after", seconds)]
        assert raised.value.reason == "open runs"
        assert raised.value.type.endswith("#temporary-reduced-capacity")


async def test_a_blocked_loop_is_seen() -> None:
    """The probe measures what a request would wait; it stops with its context."""
    overload = Overload(Thresholds(loop_lag=60))
    async with overload.watching():
        async with asyncio.timeout(20):
            while overload.loop_lag < 0.02:
                time.sleep(0.15)  # noqa: ASYNC251  blocking the loop is the point
                await asyncio.sleep(0)
        seen = overload.loop_lag
    after = overload.loop_lag
    await asyncio.sleep(2 * PROBE_SECONDS)

    assert seen >= 0.02
    assert overload.loop_lag == after


def test_tiers_are_read_from_the_lowest() -> None:
    """With spaces or without."""
    settings = load(
        {
            "PROXY_AGENT_SECRET": "a" * 32,
            "PROXY_JWT_SECRET": "j" * 32,
            "PROXY_TIERS": "bronze, default,gold",
            "PROXY_MAX_OPEN_RUNS": "7",
            "PROXY_MAX_LOOP_LAG_SECONDS": "0.5",
        }
    )

    assert settings.thresholds() == Thresholds(0.5, 7, TIERS)
