"""How much a caller may ask for: against a model that keeps every request, and in the fields that tell him.

Windows here are powers of two, and the clock stands at eighths of seconds, so that every share is exact; where a
test is about rounding, it says so.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import RateExceeded
from proxy.limits import RateLimit
from proxy.model import Headers
from proxy.standings import left_of, seconds_to_room, weighted
from proxy.windows import BoundedMemoryStorage

type Rule = tuple[int, int]
"""An amount and its window in seconds."""

RULES = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 8, 64])), min_size=1, max_size=3, unique_by=lambda rule: rule[1]
)
STARTS = st.sampled_from([0.0, 2.0**30])
STEPS = st.lists(
    st.tuples(
        st.integers(0, 16) | st.integers(0, 1200),
        st.sampled_from(["a", "a", "a", "b"]),
        st.integers(1, 2),
    ),
    max_size=30,
)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Model:
    """What a sliding window counter means: every request that was admitted, counted anew each time."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = list(rules)
        self._admitted: list[tuple[Fraction, str, int]] = []

    def weight(self, now: Fraction, partition: str, window: int) -> Fraction:
        """Count this window's requests, and the last one's by how much of it is still within `window` seconds."""
        index = now // window
        spent = [(at // window, cost) for at, who, cost in self._admitted if who == partition]
        current = sum(cost for when, cost in spent if when == index)
        previous = sum(cost for when, cost in spent if when == index - 1)
        return current + previous * (1 - (now / window - index))

    def violated(self, now: float, partition: str, cost: int = 1) -> list[Rule]:
        """Give the rules that have no room for `cost`."""
        exact = Fraction(now)
        return [rule for rule in self.rules if floor(self.weight(exact, partition, rule[1])) + cost > rule[0]]

    def remaining(self, now: float, partition: str, rule: Rule) -> int:
        """Give what a rule has left."""
        return max(0, rule[0] - floor(self.weight(Fraction(now), partition, rule[1])))

    def admit(self, now: float, partition: str, cost: int) -> None:
        """Remember a request."""
        self._admitted.append((Fraction(now), partition, cost))


def metered(notation: str, clock: Callable[[], float], *, legacy_headers: bool = False) -> RateLimit:
    """Make a rate limit that reads `clock`."""
    return RateLimit(notation, "requests", legacy_headers=legacy_headers, clock=clock)


def notation_of(rules: Iterable[Rule]) -> str:
    """Write rules as an operator does."""
    return ";".join(f"{amount}/{window} second" for amount, window in rules)


def name_of(rule: Rule, rules: list[Rule]) -> str:
    """Give the name under which a rule is told."""
    return "requests" if len(rules) == 1 else f"requests-{rule[1]}s"


def left_in(fields: Headers) -> dict[str, tuple[int, int]]:
    """Read the RateLimit field: what remains and the seconds, by policy."""
    told: dict[str, tuple[int, int]] = {}
    for item in dict(fields)[b"ratelimit"].decode().split(", "):
        name, remaining, seconds = item.split(";")
        told[name.strip('"')] = (int(remaining.removeprefix("r=")), int(seconds.removeprefix("t=")))
    return told


def has_room(rate: RateLimit, partition: str = "a") -> bool:
    """Say whether one more request would be admitted now."""
    try:
        rate.require_room(partition)
    except RateExceeded:
        return False
    return True


@given(RULES, STARTS, STEPS)
def test_admission_follows_the_model(rules: list[Rule], start: float, steps: list[tuple[int, str, int]]) -> None:
    """On any schedule a request is admitted exactly when every window has room for all of it.

    A refusal names the windows that have none, and the wait it tells is enough for each and less than a second more
    than that; what is left is told as it is, after an admission as after a refusal.
    """
    clock, model = Clock(start), Model(rules)
    rate = metered(notation_of(rules), clock)

    for eighths, partition, asked in steps:
        clock.now += eighths / 8
        cost = min(asked, *(amount for amount, _ in rules))
        violated = model.violated(clock.now, partition, cost)
        try:
            fields = rate.spend(partition, cost)
        except RateExceeded as refused:
            assert list(refused.policies) == [name_of(rule, rules) for rule in violated]  # noqa: PT017  of many steps
            later = clock.now + refused.retry_after
            assert not [rule for rule in model.violated(later, partition, cost) if rule in violated]
            if refused.retry_after > 1:
                assert [rule for rule in model.violated(later - 1, partition, cost) if rule in violated]
            fields = refused.fields
        else:
            assert not violated
            model.admit(clock.now, partition, cost)
        remaining = {name_of(rule, rules): model.remaining(clock.now, partition, rule) for rule in rules}
        assert {name: told for name, (told, _) in left_in(fields).items()} == remaining


@given(RULES, STARTS, STEPS)
def test_the_told_seconds_are_until_more_fits(
    rules: list[Rule], start: float, steps: list[tuple[int, str, int]]
) -> None:
    """Where nothing remains, `t` is until something does; else it is until the window turns, never beyond it."""
    clock, model = Clock(start), Model(rules)
    rate = metered(notation_of(rules), clock)

    for eighths, partition, _ in steps:
        clock.now += eighths / 8
        if not model.violated(clock.now, partition):
            model.admit(clock.now, partition, 1)
            rate.spend(partition)
        for rule in rules:
            remaining, seconds = left_in(rate.fields(partition))[name_of(rule, rules)]
            if remaining == 0:
                assert model.remaining(clock.now + seconds, partition, rule) > 0
                assert seconds == 1 or model.remaining(clock.now + seconds - 1, partition, rule) == 0
            else:
                assert seconds == -(-(rule[1] - clock.now % rule[1]) // 1)


@given(RULES, STARTS, STEPS)
def test_asking_for_room_costs_nothing(rules: list[Rule], start: float, steps: list[tuple[int, str, int]]) -> None:
    """Whether there is room can be asked as often as one likes."""
    clock, model = Clock(start), Model(rules)
    rate = metered(notation_of(rules), clock)

    for eighths, partition, times in steps:
        clock.now += eighths / 8
        violated = model.violated(clock.now, partition)
        rooms = {has_room(rate, partition) for _ in range(times)}
        assert rooms == {not violated}
        if not violated:
            rate.spend(partition)
            model.admit(clock.now, partition, 1)


def test_a_refusal_spends_nothing_anywhere() -> None:
    """Of several windows all are charged or none: what one refuses does not wear the other down."""
    clock = Clock(2.0**30)
    rate = metered("2/8 second;5/64 second", clock)
    for _ in range(2):
        rate.spend("a")

    for _ in range(10):
        with pytest.raises(RateExceeded) as refused:
            rate.spend("a")
    clock.now += 16
    fields = rate.spend("a")

    assert refused.value.policies == ("requests-8s",)
    assert left_in(refused.value.fields)["requests-64s"][0] == 3
    assert {name: left for name, (left, _) in left_in(fields).items()} == {"requests-8s": 1, "requests-64s": 2}


@pytest.mark.parametrize("start", [0, 2**30, 1_700_000_041])
@pytest.mark.parametrize("notation", ["1/minute", "3/hour", "7/10 seconds", "60/minute", "2/second;5/minute"])
@given(steps=st.lists(st.sampled_from([0, 0, 0, 1, 2, 7, 19, 59, 60, 61, 600]), max_size=25))
def test_waiting_as_told_is_enough(notation: str, start: int, steps: list[int]) -> None:
    """Who waits the told whole seconds is admitted, to the instant, in windows of any length and at any time.

    (`Retry-After` is never earlier than the room: rounding may make it later, not earlier.)
    """
    clock = Clock(start)
    rate = metered(notation, clock)

    for step in steps:
        clock.now += step
        try:
            rate.spend("a")
        except RateExceeded as refused:
            clock.now += refused.retry_after
            assert has_room(rate)


@pytest.mark.parametrize("start", [0.0, 2.0**30])
@pytest.mark.parametrize("notation", ["1/minute", "3/hour", "7/10 seconds", "60/minute"])
@given(steps=st.lists(st.floats(0, 100), max_size=25))
def test_waiting_less_is_not(notation: str, start: float, steps: list[float]) -> None:
    """Who comes a second earlier than told is not admitted: the wait is never a second too long."""
    clock = Clock(start)
    rate = metered(notation, clock)

    for step in steps:
        clock.now += step
        try:
            rate.spend("a")
        except RateExceeded as refused:
            if refused.retry_after > 1:
                clock.now += refused.retry_after - 1 - 1e-4
                assert not has_room(rate)


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
    ],
)
def test_the_fields_are_those_of_the_draft(notation: str, policies: bytes, standing: bytes) -> None:
    """Policies with quota and window, and of each what remains and for how long: structured fields."""
    rate = metered(notation, Clock(2.0**30))

    fields = rate.spend("a")

    assert fields == [(b"ratelimit-policy", policies), (b"ratelimit", standing)]


def test_a_refusal_tells_all_there_is_to_know() -> None:
    """429 has the fields of every answer, the violated policies and the time to come again."""
    clock = Clock(2.0**30)
    rate = metered("1/8 second;100/64 second", clock)
    rate.spend("a")

    with pytest.raises(RateExceeded) as refused:
        rate.spend("a")

    problem = refused.value
    assert problem.policies == ("requests-8s",)
    assert problem.retry_after == 9
    assert problem.headers() == [
        (b"ratelimit-policy", b'"requests-8s";q=1;w=8, "requests-64s";q=100;w=64'),
        (b"ratelimit", b'"requests-8s";r=0;t=9, "requests-64s";r=99;t=64'),
        (b"retry-after", b"9"),
    ]


def test_older_clients_are_told_in_their_words() -> None:
    """Behind a setting, X-RateLimit fields tell of the policy with the least left; the reset is a Unix time."""
    fields = dict(metered("5/64 second;9/8 second", Clock(2.0**30), legacy_headers=True).spend("a"))

    assert fields[b"x-ratelimit-limit"] == b"5"
    assert fields[b"x-ratelimit-remaining"] == b"4"
    assert int(fields[b"x-ratelimit-reset"]) == 2**30 + 64
    assert not [name for name, _ in metered("1/minute", Clock()).spend("a") if name.startswith(b"x-")]


def test_off_admits_everything_and_says_nothing() -> None:
    """Without a rule there is no refusal, and there are no fields."""
    rate = RateLimit("off", "requests")

    told = [rate.spend("a", 1000) for _ in range(100)]
    rate.require_room("a")

    assert told == [[]] * 100
    assert rate.fields("a") == []


def test_nobody_pays_for_another() -> None:
    """One partition's spending is no other's, be their names as near as they like."""
    rate = metered("1/minute", Clock())
    rate.spend("a")

    rooms = [has_room(rate, partition) for partition in ("a", "A", "a ", "a/", "a/1", "")]

    assert rooms == [False, True, True, True, True, True]


def test_two_limits_count_apart() -> None:
    """Failures do not spend requests: each limit has counts of its own."""
    requests, failures = RateLimit("1/year", "requests"), RateLimit("1/year", "failures")

    requests.spend("a")

    assert not has_room(requests)
    assert has_room(failures)


def test_a_rule_said_twice_is_one_rule() -> None:
    """Writing the same window twice does not charge it twice."""
    rate = metered("2/minute;2/minute", Clock())

    rate.spend("a")

    assert has_room(rate)


@pytest.mark.parametrize("notation", ["2/minute;5/minute", "5/minute;2/minute", "5/60 seconds;2/minute"])
def test_the_least_of_two_amounts_for_one_window_counts(notation: str) -> None:
    """Two amounts for one window are one policy, told once, and the smaller is what is felt."""
    rate = metered(notation, Clock(2.0**30))

    fields = [rate.spend("a"), rate.spend("a")]

    assert not has_room(rate)
    assert dict(fields[0])[b"ratelimit-policy"] == b'"requests";q=2;w=60'
    assert [left_in(each)["requests"][0] for each in fields] == [1, 0]


@pytest.mark.parametrize("notation", ["2/8 second", "2/8 second;3/64 second"])
def test_asking_for_room_is_refused_as_spending_is(notation: str) -> None:
    """Who only asks is told the same policies, wait and fields as who spends."""
    rate = metered(notation, Clock(2.0**30 + 9))
    for _ in range(2):
        rate.spend("a")

    with pytest.raises(RateExceeded) as asked:
        rate.require_room("a")
    with pytest.raises(RateExceeded) as spent:
        rate.spend("a")

    assert asked.value.policies == spent.value.policies
    assert asked.value.headers() == spent.value.headers()


@pytest.mark.parametrize(("notation", "cost"), [("3/minute", 4), ("3/minute", 100), ("9/hour;3/minute", 4)])
def test_a_cost_beyond_the_amount_is_refused(notation: str, cost: int) -> None:
    """What no window could ever hold is refused like any other, whatever was spent."""
    rate = metered(notation, Clock())

    with pytest.raises(RateExceeded) as refused:
        rate.spend("a", cost)

    assert refused.value.policies
    assert refused.value.retry_after >= 1


def test_a_refusal_names_a_policy_though_time_goes_on() -> None:
    """A request is refused or admitted as of one moment: room that comes a moment later does not blur the answer."""
    clock = Clock(2.0**30)
    rate = metered("4/8 second", lambda: readings.pop(0) if readings else clock.now)
    readings: list[float] = []
    for _ in range(4):
        rate.spend("a")
    clock.now += 8 + 2**-20
    readings.append(clock.now - 2**-19)

    with pytest.raises(RateExceeded) as refused:
        rate.spend("a")

    assert refused.value.policies == ("requests",)
    assert left_in(refused.value.fields)["requests"][0] == 0


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

    rate = RateLimit("2/year", "requests")
    fields = [rate.spend("a"), rate.spend("a")]

    assert not has_room(rate)
    assert [[name for name, _ in each] for each in fields] == [[b"ratelimit-policy", b"ratelimit"]] * 2
    assert isinstance(rate._strategy.storage, BoundedMemoryStorage)


def test_a_file_in_the_working_directory_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a `.env` that happens to lie where the process was started."""
    lines = [f"RATELIMIT_{name}={value}" for name, values in HOSTILE.items() for value in values]
    (tmp_path / ".env").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)

    rate = RateLimit("2/year", "requests")
    for _ in range(2):
        rate.spend("a")

    assert not has_room(rate)


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
