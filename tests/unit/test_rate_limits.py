"""Rates in this process: the wait that is told, what the fields say, and that nothing else has a say in it.

That admission follows its model is held for every tier in tests/contract/test_limit_tiers.py.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import RateExceeded
from proxy.failures import Failures
from proxy.limitsettings import read_rates
from proxy.localtier import LocalTier
from proxy.policies import Plan, Policies, Policy
from proxy.standings import fields_of, left_of, seconds_to_room, weighted

HERE = "192.0.2.1"


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def metered(notation: str, clock: Callable[[], float]) -> Failures:
    """Count failures by `clock`."""
    return Failures(read_rates(notation), clock=clock)


def plan_of(notation: str, *, cost: int = 1) -> Plan:
    """Lay out the plan of one policy."""
    policy = Policy(name="requests", rates=read_rates(notation))
    return Policies([policy], costs={"invoke": cost}, read_rates=read_rates).plan("invoke")


def has_room(failures: Failures, address: str = HERE) -> bool:
    """Say whether one more failure would pass now."""
    try:
        failures.require_room(address)
    except RateExceeded:
        return False
    return True


@pytest.mark.parametrize("start", [0, 2**30, 1_700_000_041])
@pytest.mark.parametrize("notation", ["1/minute", "3/hour", "7/10 seconds", "60/minute", "2/second;5/minute"])
@given(steps=st.lists(st.sampled_from([0, 0, 0, 1, 2, 7, 19, 59, 60, 61, 600]), max_size=25))
def test_waiting_as_told_is_enough(notation: str, start: int, steps: list[int]) -> None:
    """Who waits the told whole seconds is admitted, to the instant, in windows of any length and at any time.

    (`Retry-After` is never earlier than the room: rounding may make it later, not earlier.)
    """
    clock = Clock(start)
    failures = metered(notation, clock)

    for step in steps:
        clock.now += step
        try:
            failures.spend(HERE)
        except RateExceeded as refused:
            clock.now += refused.retry_after
            assert has_room(failures)


@pytest.mark.parametrize("start", [0.0, 2.0**30])
@pytest.mark.parametrize("notation", ["1/minute", "3/hour", "7/10 seconds", "60/minute"])
@given(steps=st.lists(st.floats(0, 100), max_size=25))
def test_waiting_less_is_not(notation: str, start: float, steps: list[float]) -> None:
    """Who comes a second earlier than told is not admitted: the wait is never a second too long."""
    clock = Clock(start)
    failures = metered(notation, clock)

    for step in steps:
        clock.now += step
        try:
            failures.spend(HERE)
        except RateExceeded as refused:
            if refused.retry_after > 1:
                clock.now += refused.retry_after - 1 - 1e-4
                assert not has_room(failures)


@pytest.mark.parametrize(
    ("notation", "policies", "standing"),
    [
        ("60/minute", b'"requests";q=60;w=60', b'"requests";r=59;t=56'),
        ("1/second", b'"requests";q=1;w=1', b'"requests";r=0;t=2'),
        ("10 per 2 hours", b'"requests";q=10;w=7200', b'"requests";r=9;t=1376'),
        (
            "5/second;60/minute",
            b'"requests-1s";q=5;w=1, "requests-60s";q=60;w=60',
            b'"requests-1s";r=4;t=1, "requests-60s";r=59;t=56',
        ),
        ("2/minute;5/60 seconds", b'"requests";q=2;w=60', b'"requests";r=1;t=56'),
    ],
)
def test_the_fields_are_those_of_the_draft(notation: str, policies: bytes, standing: bytes) -> None:
    """Policies with quota and window, and of each what remains and for how long: structured fields.

    Of two amounts for one window the smaller is told, once. Older clients are told a Unix time.
    """
    plan, tier = plan_of(notation), LocalTier(clock=Clock(2.0**30))

    _, standings = tier.decide(plan, [quota.key for quota in plan.quotas])
    fields = fields_of(plan, standings, legacy_at=2.0**30)

    assert fields[:2] == [(b"ratelimit-policy", policies), (b"ratelimit", standing)]
    tightest = min(standings, key=lambda each: each.remaining)
    assert dict(fields)[b"x-ratelimit-reset"] == b"%d" % (2**30 + tightest.grows)


def test_a_refusal_tells_all_there_is_to_know() -> None:
    """429 has the fields of every answer, the violated policies and the time to come again; asked or spent."""
    failures = metered("1/8 second;100/64 second", Clock(2.0**30))
    failures.spend(HERE)

    with pytest.raises(RateExceeded) as spent:
        failures.spend(HERE)
    with pytest.raises(RateExceeded) as asked:
        failures.require_room(HERE)

    for problem in (spent.value, asked.value):
        assert problem.policies == ("failures-8s",)
        assert problem.retry_after == 9
        assert problem.headers() == [
            (b"ratelimit-policy", b'"failures-8s";q=1;w=8, "failures-64s";q=100;w=64'),
            (b"ratelimit", b'"failures-8s";r=0;t=9, "failures-64s";r=99;t=64'),
            (b"retry-after", b"9"),
        ]


def test_off_refuses_nobody() -> None:
    """Without a rate there is always room."""
    failures = metered("off", Clock())

    for _ in range(1000):
        failures.spend(HERE)

    assert has_room(failures)


def test_no_address_pays_for_another() -> None:
    """Whoever has spent his failures has spent nobody else's; asking whether there is room spends nothing."""
    failures = metered("1/minute", Clock())
    failures.spend(HERE)

    rooms = [has_room(failures, address) for address in (HERE, "192.0.2.11", "192.0.2.1:80", "2001:db8::1", "")] * 2

    assert rooms == [False, True, False, True, True] * 2


@pytest.mark.parametrize(("notation", "cost"), [("3/minute", 4), ("3/minute", 100), ("9/hour;3/minute", 4)])
def test_a_cost_beyond_the_amount_is_refused(notation: str, cost: int) -> None:
    """What no window could ever hold is refused like any other, whatever was spent."""
    plan = plan_of(notation, cost=cost)

    admitted, standings = LocalTier(clock=Clock()).decide(plan, [quota.key for quota in plan.quotas])

    assert not admitted
    assert [standing.wait >= 1 for standing in standings if not standing.fits] == [True]


def test_a_refusal_names_a_policy_though_time_goes_on() -> None:
    """A request is refused or admitted as of one moment: room that comes a moment later does not blur the answer."""
    clock = Clock(2.0**30)
    failures = metered("4/8 second", lambda: readings.pop(0) if readings else clock.now)
    readings: list[float] = []
    for _ in range(4):
        failures.spend(HERE)
    clock.now += 8 + 2**-20
    for ask in (failures.spend, failures.require_room):
        readings.append(clock.now - 2**-19)

        with pytest.raises(RateExceeded) as refused:
            ask(HERE)

        assert refused.value.policies == ("failures",)
        assert dict(refused.value.fields)[b"ratelimit"].startswith(b'"failures";r=0;')


HOSTILE = {
    "ENABLED": ["false", "banana"],
    "HEADERS_ENABLED": ["true", "banana"],
    "STORAGE_URL": ["redis://nowhere.invalid", "banana"],
    "STORAGE_OPTIONS": ["banana", "{}"],
    "STRATEGY": ["fixed-window", "banana"],
    "DEFAULT": ["1/hour", "banana"],
    "GLOBAL": ["1/hour"],
    "APPLICATION": ["1/hour", "banana"],
    "HEADER_LIMIT": ["X-Banana"],
    "HEADER_REMAINING": ["X-Banana"],
    "HEADER_RESET": ["X-Banana"],
    "HEADER_RETRY_AFTER": ["X-Banana"],
    "HEADER_RETRY_AFTER_VALUE": ["banana"],
    "SWALLOW_ERRORS": ["true", "banana"],
    "IN_MEMORY_FALLBACK": ["1/hour", "banana"],
    "IN_MEMORY_FALLBACK_ENABLED": ["true", "banana"],
    "KEY_PREFIX": ["banana"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(f"RATELIMIT_{name}", value) for name, values in HOSTILE.items() for value in values]
)
def test_the_environment_changes_nothing(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What slowapi would read from the environment counts for nothing: our settings are the only ones."""
    monkeypatch.setenv(name, value)

    assert _refuses_the_third()


def test_a_file_in_the_working_directory_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a `.env` that happens to lie where the process was started."""
    lines = [f"RATELIMIT_{name}={value}" for name, values in HOSTILE.items() for value in values]
    (tmp_path / ".env").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)

    assert _refuses_the_third()


def _refuses_the_third() -> bool:
    plan, tier = plan_of("2/year"), LocalTier()
    return [tier.decide(plan, ["a"])[0] for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("previous", "current", "limit", "window", "left", "seconds"),
    [
        (0, 1, 1, 60, 60, 61),
        (0, 1, 1, 60, 0.5, 1),
        (0, 10, 10, 60, 30, 31),
        (10, 0, 10, 60, 60, 1),
        (10, 5, 10, 60, 60, 31),
        (10, 5, 10, 60, 45, 16),
        (10, 9, 10, 60, 60, 55),
        (0, 20, 10, 60, 30, 61),
        (5, 10, 10, 60, 30, 31),
        (10, 0, 10, 60, 1, 1),
        (0, 0, 1, 60, 60, 1),
    ],
)
def test_the_seconds_to_room(previous: int, current: int, limit: int, window: int, left: float, seconds: int) -> None:
    """Within this window the last one must sink; if this one is full, it must become the last and sink."""
    assert seconds_to_room(previous, current, limit=limit, window=window, left=left) == seconds


@given(
    st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.sampled_from([1, 8, 64]), st.integers(1, 512)
)  # fmt: skip
def test_the_seconds_to_room_are_the_least_whole_ones(
    previous: int, current: int, limit: int, window: int, eighths: int
) -> None:
    """They are enough, and one less is not: by the definition of the weight, whatever the counts."""
    left = Fraction(min(eighths, window * 8), 8)

    seconds = seconds_to_room(previous, current, limit=limit, window=window, left=float(left))

    assert _fits(previous, current, limit=limit, window=window, left=left, after=seconds)
    assert seconds == 1 or not _fits(previous, current, limit=limit, window=window, left=left, after=seconds - 1)


def _fits(previous: int, current: int, *, limit: int, window: int, left: Fraction, after: int) -> bool:
    ahead = left - after
    weight = previous * ahead / window + current if ahead > 0 else current * max(Fraction(0), 1 + ahead / window)
    return weight < limit


@pytest.mark.parametrize(
    ("now", "window", "share"), [(0, 60, 1.0), (30, 60, 0.5), (45, 60, 0.25), (60, 60, 1.0), (90.0, 60, 0.5)]
)
def test_the_share_of_the_last_window_sinks(now: float, window: int, share: float) -> None:
    """It is whole when the window turns, and nothing just before it turns again."""
    assert left_of(window, now) / window == share
    assert weighted(8, 3, share) == 8 * share + 3
