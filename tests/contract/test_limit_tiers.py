"""Each kind of quota against a model that keeps everything, on random schedules: in this process, and on a real Redis.

Windows are powers of two and times eighths of seconds, so that every share is exact. On Redis the scripts are the real
ones, but for the clock: they read it from a key, and what they write outlasts the test, since Redis expires it by a
clock of its own. A Redis that fails to answer fails the test with its reason.
"""

import asyncio
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.admission import Limits
from proxy.errors import RateExceeded
from proxy.limitsettings import read_own
from proxy.localtier import LocalTier
from proxy.model import CredentialKind, Lease, Principal
from proxy.operations import OPERATIONS
from proxy.policies import Policies, Policy, Strategy, Unit
from proxy.redisclient import Courier, Script
from proxy.redistier import SharedTier
from tests.support.redis import Redis, running_redis

INVOKE = next(row for row in OPERATIONS if row.name == "invoke")
START = 2.0**30
CLOCK = "the-clock-of-the-test"
CALLER = Principal("a", "a", "key:a", frozenset(), CredentialKind.API_KEY)


@dataclass(frozen=True, slots=True)
class Rule:
    """One policy of one window; a window of 0 is for runs at once."""

    amount: int
    window: int
    strategy: Strategy


@st.composite
def rules(draw: st.DrawFn) -> list[Rule]:
    """Draw one to three windows, each with its strategy, and sometimes a number of runs."""
    kinds = st.sampled_from([Strategy.FIXED, Strategy.SLIDING, Strategy.MOVING])
    windows = st.builds(Rule, st.integers(2, 6), st.sampled_from([1, 2, 8, 64]), kinds)
    drawn = draw(st.lists(windows, min_size=1, max_size=3))
    return [*drawn, Rule(draw(st.integers(1, 4)), 0, Strategy.CONCURRENCY)] if draw(st.booleans()) else drawn


STEPS = st.lists(
    st.tuples(st.integers(0, 16) | st.integers(0, 1200), st.sampled_from("aaab"), st.booleans()), max_size=25
)


@dataclass(slots=True)
class Model:
    """Everything that was admitted, counted anew each time."""

    rules: list[Rule]
    cost: int
    admitted: list[tuple[Fraction, str]] = field(default_factory=list)
    running: list[str] = field(default_factory=list)

    def count(self, rule: Rule, who: str, now: Fraction) -> Fraction:
        """Give what counts against a rule."""
        if rule.strategy is Strategy.CONCURRENCY:
            return Fraction(self.running.count(who))
        times = [at for at, whose in self.admitted if whose == who]
        if rule.strategy is Strategy.MOVING:
            return Fraction(self.cost * sum(at > now - rule.window for at in times))
        index = now // rule.window
        current = self.cost * sum(at // rule.window == index for at in times)
        previous = self.cost * sum(at // rule.window == index - 1 for at in times)
        share = 1 - (now / rule.window - index) if rule.strategy is Strategy.SLIDING else Fraction(0)
        return current + previous * share

    def fits(self, rule: Rule, who: str, now: Fraction, need: int) -> bool:
        """Say whether so much more fits."""
        return floor(self.count(rule, who, now)) + need <= rule.amount


def check_growth(model: Model, rule: Rule, who: str, at: Fraction, *, seconds: int, admitted: bool) -> None:
    """Hold the told seconds to the model: until something fits where nothing does, or else until the window turns."""
    if not rule.window:
        return
    if not model.fits(rule, who, at, 1):
        assert model.fits(rule, who, at + seconds, 1)
        assert seconds == 1 or not model.fits(rule, who, at + seconds - 1, 1)
    elif admitted and rule.strategy is not Strategy.MOVING:
        assert seconds == ceil(rule.window - at % rule.window)


class House:
    """Limits whose clock is ours, and the loop they live in."""

    def __init__(self, limits: Limits, run: Callable[[Any], Any], set_clock: Callable[[float], None]) -> None:
        self.limits = limits
        self.run = run
        self.set_clock = set_clock
        self.local = limits._local

    def admit(self, who: str) -> Lease:
        """Ask for a run."""
        lease: Lease = self.run(self.limits.admit(CALLER, who, INVOKE))
        return lease


def in_process(loop: asyncio.Runner, redis: Redis) -> House:
    """Count in this process."""
    now = [START]
    limits = Limits(Policies(read_rates=read_own), partition_of=str, local=LocalTier(clock=lambda: now[0]))
    return House(limits, loop.run, lambda at: now.__setitem__(0, at))


def with_clock(script: Script) -> Script:
    """Give a script that reads its time from our key, and writes nothing that real time takes away."""
    text = script.text.replace("redis.call('TIME')", f"redis.call('LRANGE', '{CLOCK}', 0, 1)")
    text = re.sub(r"redis\.call\('PEXPIRE', ([\w.\[\]]+), math\.ceil\((.+)\)\)", r"redis.call('PERSIST', \1)", text)
    assert "'TIME'" not in text
    assert "EXPIRE" not in text
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def on_redis(loop: asyncio.Runner, redis: Redis) -> House:
    """Count on Redis."""
    ticks = [START]
    local = LocalTier(clock=lambda: ticks[0])
    courier = Courier(redis.url, timeout=60)
    courier.note_time = lambda now: None  # type: ignore[method-assign]  # no deadline: here time is what we say
    tier = SharedTier(courier, local, prefix="test", lease_seconds=30_000, without="refuse", ticks=lambda: ticks[0])
    told = tier._outstanding
    tier._admit, told._settle, told._renew = map(with_clock, (tier._admit, told._settle, told._renew))
    limits = Limits(Policies(read_rates=read_own), partition_of=str, local=local, shared=tier, without="refuse")
    client = tier._courier._client

    def set_clock(at: float) -> None:
        async def write() -> None:
            await client.delete(CLOCK)
            await client.rpush(CLOCK, str(int(at)), str(int(at % 1 * 1_000_000)))

        loop.run(write())
        ticks[0] = at

    set_clock(START)
    return House(limits, loop.run, set_clock)


@contextmanager
def houses(make: Callable[[asyncio.Runner, Redis], House]) -> Iterator[House]:
    """Build one, and end it."""
    with running_redis() as redis, asyncio.Runner() as loop:
        house = make(loop, redis)
        yield house
        if house.limits._shared is not None:
            loop.run(house.limits._shared.close())


@pytest.fixture(scope="module", params=[in_process, on_redis])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """Give each tier in turn."""
    with houses(request.param) as made:
        yield made


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    """Give the counts on Redis."""
    with houses(on_redis) as made:
        yield made


NUMBERS = itertools.count()


def policies_of(drawn: list[Rule], cost: int) -> Policies:
    """Write the rules as policies with names that were never used before."""
    mark = next(NUMBERS)
    made = [
        Policy(
            name=f"p{mark}-{place}",
            rates=((rule.amount, rule.window),),
            strategy=rule.strategy,
            unit=Unit.REQUESTS if rule.window else Unit.RUNS,
        )
        for place, rule in enumerate(drawn)
    ]
    return Policies(made, costs={"invoke": cost}, read_rates=read_own)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(drawn=rules(), cost=st.integers(1, 2), steps=STEPS)
def test_admission_follows_the_model(
    house: House, drawn: list[Rule], cost: int, steps: list[tuple[int, str, bool]]
) -> None:
    """A request is admitted exactly when all of it fits in every quota; else nothing is charged.

    What remains is told as it is, and when it grows; who waits as told fits in what refused him, and a second earlier
    he did not.
    """
    policies, model, now = policies_of(drawn, cost), Model(drawn, cost), START
    house.limits.replace(policies)
    names = [policy.name for policy in policies.policies]
    leases: list[tuple[str, Lease]] = []

    for eighths, who, ends in steps:
        now += eighths / 8
        house.set_clock(now)
        if ends and leases:
            whose, lease = leases.pop(0)
            lease.release()
            lease.release()
            if house.limits._shared is not None:
                house.run(house.limits._shared._outstanding.settle(everything=False))
            model.running.remove(whose)
        at = Fraction(now)
        needs = {rule: cost if rule.window else 1 for rule in drawn}
        violated = [place for place, rule in enumerate(drawn) if not model.fits(rule, who, at, needs[rule])]
        try:
            lease = house.admit(who)
        except RateExceeded as refused:
            assert list(refused.policies) == [names[place] for place in violated]  # noqa: PT017  of many steps
            later = at + refused.retry_after
            windows = [drawn[place] for place in violated if drawn[place].window]
            assert all(model.fits(rule, who, later, needs[rule]) for rule in windows)
            if refused.retry_after > 1:
                assert not all(model.fits(rule, who, later - 1, needs[rule]) for rule in windows)
            fields = dict(refused.fields)
        else:
            assert not violated
            leases.append((who, lease))
            model.admitted.append((at, who))
            model.running.append(who)
            fields = dict(lease.fields)
        told = dict(item.split(";r=") for item in fields[b"ratelimit"].decode().split(", "))
        for name, rule in zip(names, drawn, strict=True):
            remaining, _, seconds = told[f'"{name}"'].partition(";t=")
            assert int(remaining) == max(0, rule.amount - floor(model.count(rule, who, at)))
            assert bool(seconds) == bool(rule.window)
            check_growth(model, rule, who, at, seconds=int(seconds or 0), admitted=not violated)
    for _, lease in leases:
        lease.release()
    assert house.local.running == 0
    if house.limits._shared is not None:
        house.run(house.limits._shared._outstanding.settle(everything=False))


BUDGETS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=15)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strategy=st.sampled_from([Strategy.FIXED, Strategy.SLIDING]), steps=BUDGETS)
def test_a_budget_follows_the_model(house: House, strategy: Strategy, steps: list[tuple[int, int]]) -> None:
    """While something is left a run begins; what it used is charged whole, over the budget too."""
    mark, now = next(NUMBERS), START
    budget = Policy(name=f"t{mark}", rates=((100, 8),), unit=Unit.TOKENS, strategy=strategy)
    house.limits.replace(Policies([budget], read_rates=read_own))
    charged: list[tuple[Fraction, int]] = []

    for eighths, tokens in steps:
        now += eighths / 8
        house.set_clock(now)
        at = Fraction(now)
        current = sum(amount for when, amount in charged if when // 8 == at // 8)
        previous = sum(amount for when, amount in charged if when // 8 == at // 8 - 1)
        spent = current + (previous * (1 - (at / 8 - at // 8)) if strategy is Strategy.SLIDING else 0)
        try:
            lease = house.admit("a")
        except RateExceeded as refused:
            assert floor(spent) >= 100
            assert refused.policies == (f"t{mark}",)  # noqa: PT017  of many steps
            continue
        assert floor(spent) < 100
        assert lease.charge(tokens, estimated=False) == (floor(spent + tokens) < 100)
        lease.release()
        if house.limits._shared is not None:
            house.run(house.limits._shared._outstanding.settle(everything=True))
        charged.append((at, tokens))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strategy=st.sampled_from([Strategy.FIXED, Strategy.SLIDING, Strategy.MOVING]),
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=12),
    after=st.integers(0, 9),
)
def test_what_was_used_without_redis_is_charged_as_of_then(
    shared: House, strategy: Strategy, steps: list[tuple[int, int]], after: int
) -> None:
    """However long it was away: what a window has forgotten costs nothing, and what it has not costs what it would."""
    policy = Policy(name=f"d{next(NUMBERS)}", rates=((1000, 8),), strategy=strategy)
    plan, tier, now = Policies([policy], read_rates=read_own).plan("invoke"), shared.limits._shared, START
    model = Model([Rule(1000, 8, strategy)], 1)
    assert tier is not None
    for quarters, amount in steps:  # a quarter of a window is charged together, as of its end
        now += 2 * quarters
        shared.set_clock(now)
        tier.owe(plan.quotas[0], f"{{a}}:{plan.quotas[0].key}", amount)
        model.admitted += [(Fraction(now), "a")] * amount

    now += 2 * after
    shared.set_clock(now)
    shared.run(tier._outstanding.settle(everything=True))
    (standing,) = shared.run(tier.peek(plan, [f"{{a}}:{plan.quotas[0].key}"]))

    assert standing.remaining == 1000 - floor(model.count(model.rules[0], "a", Fraction(now)))


def test_a_run_that_goes_on_is_charged_now_and_then_and_at_once_when_it_ends(shared: House) -> None:
    """A stream that is charged with each message does not cost Redis a script for each; its end is not put off."""
    tier, budget = shared.limits._shared, Policy(name=f"u{next(NUMBERS)}", rates=((1000, 64),), unit=Unit.TOKENS)
    assert tier is not None
    shared.limits.replace(Policies([budget], read_rates=read_own))
    plan = shared.limits._policies.plan("invoke")

    def left_after(seconds: float) -> int:
        shared.set_clock(START + seconds)
        shared.run(tier._outstanding.settle(everything=False))
        remaining: int = shared.run(tier.peek(plan, shared.limits.keys_of(plan, "a", "")))[0].remaining
        return remaining

    shared.set_clock(START)
    shared.run(tier._outstanding.settle(everything=True))
    left_after(1)
    lease = shared.admit("a")
    left = []
    for seconds in (1.1, 1.2, 1.6, 1.7):
        lease.charge(10, estimated=True)
        left.append(left_after(seconds))
    lease.release()
    lease.charge(5, estimated=False)
    left.append(left_after(1.8))

    assert left == [1000, 1000, 970, 970, 955]


def test_what_was_estimated_too_high_is_given_back(house: House) -> None:
    """Once the sidecar has told what a run used, that is what it costs; never less than nothing."""
    house.set_clock(START)
    house.limits.replace(
        Policies([Policy(name=f"g{next(NUMBERS)}", rates=((100, 64),), unit=Unit.TOKENS)], read_rates=read_own)
    )
    told = []
    for charged in (90, -60, -80):
        lease = house.admit("a")
        lease.charge(charged, estimated=True)
        lease.release()
        if house.limits._shared is not None:
            house.run(house.limits._shared._outstanding.settle(everything=True))
        told.append(dict(house.admit("a").fields)[b"ratelimit"].split(b";")[1])

    assert told == [b"r=10", b"r=70", b"r=100"]


def test_nobody_collides_with_another_by_name(house: House) -> None:
    """Keys are made of hashed partitions and of policies' own names: no caller's text parts them."""
    policy = Policy(name=f"n{next(NUMBERS)}", rates=((1, 64),))
    plan = Policies([policy], read_rates=read_own).plan("invoke")
    hostile = ["a", "a/b", "a:b", "a}", "{a}", "a}:b", "all", "a b", "a\n", "A", ""]
    house.limits.replace(Policies([policy], read_rates=read_own))

    keys = {house.limits.keys_of(plan, payer, "")[0] for payer in hostile}
    for payer in hostile:
        house.admit(payer)

    assert len(keys) == len(hostile)


def test_a_shadow_refuses_nobody_and_charges_as_if_it_did(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """It is counted and logged what would have been refused, and told to nobody."""
    mark = next(NUMBERS)
    shadow = Policy(name=f"s{mark}", rates=((2, 64),), shadow=True)
    real = Policy(name=f"r{mark}", rates=((4, 64),))
    house.limits.replace(Policies([shadow, real], read_rates=read_own))
    house.limits.decisions.clear()
    house.set_clock(START)

    with caplog.at_level("INFO"):
        leases = [house.admit("a") for _ in range(4)]
        with pytest.raises(RateExceeded) as refused:
            house.admit("a")

    assert refused.value.policies == (f"r{mark}",)
    assert all(b"s%d" % mark not in value for lease in leases for _, value in lease.fields)
    assert house.limits.decisions == {
        (f"s{mark}", "admitted"): 2,
        (f"s{mark}", "would_refuse"): 3,
        (f"r{mark}", "admitted"): 4,
        (f"r{mark}", "refused"): 1,
    }
    assert [record.getMessage() for record in caplog.records] == ["limits.would_refuse"]


def test_a_shadow_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """However many it would refuse: a line each ten seconds and policy, which says how many had none."""
    now = [START]
    shadows = [Policy(name=name, rates=((1, 1 << 20),), shadow=True) for name in ("one", "two")]
    limits = Limits(Policies(shadows, read_rates=read_own), partition_of=str, local=LocalTier(), clock=lambda: now[0])
    with caplog.at_level("INFO"), asyncio.Runner() as loop:
        for second in (0, 1, 2, 9, 10, 11):
            now[0] = START + second
            loop.run(limits.admit(CALLER, "a", INVOKE))

    told = [(record.fields["policy"], record.fields["untold"]) for record in caplog.records]  # type: ignore[attr-defined]  # ours
    assert told == [("one", 0), ("two", 0), ("one", 3), ("two", 3)]


def test_older_clients_are_told_of_requests_only(house: House) -> None:
    """A slot that is left is no request that is left; where nothing counts requests they are told nothing."""
    mark = next(NUMBERS)
    runs = Policy(name=f"c{mark}", rates=((1, 0),), unit=Unit.RUNS, strategy=Strategy.CONCURRENCY)
    windows = Policy(name=f"w{mark}", rates=((9, 64), (5, 8)))
    house.set_clock(START)
    house.limits._legacy = True
    told = []
    for policies in ([runs, windows], [runs]):
        house.limits.replace(Policies(policies, read_rates=read_own))
        lease = house.admit(f"older-{len(policies)}")
        told.append({name: value for name, value in lease.fields if name.startswith(b"x-")})
        lease.release()
    house.limits._legacy = False

    assert (told[0][b"x-ratelimit-limit"], told[0][b"x-ratelimit-remaining"]) == (b"5", b"4")
    assert told[1] == {}


def test_a_quota_is_its_key(house: House) -> None:
    """Another amount under the same name goes on with what was counted; another strategy begins anew."""
    name = f"q{next(NUMBERS)}"
    house.set_clock(START)
    told = []
    for amount, strategy in ((5, Strategy.SLIDING), (3, Strategy.SLIDING), (3, Strategy.MOVING)):
        policy = Policy(name=name, rates=((amount, 64),), strategy=strategy)
        house.limits.replace(Policies([policy], read_rates=read_own))
        told.append(dict(house.admit("a").fields)[b"ratelimit"].split(b";")[1])

    assert told == [b"r=4", b"r=1", b"r=2"]
