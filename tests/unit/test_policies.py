"""Which quotas a request must fit in: policies as an operator writes them, laid out for an operation and its caller."""

import pytest

from proxy.limitsettings import parse_policies, read_own
from proxy.policies import RATE, Per, Policies, Policy, Strategy, Unit

WHOLE = """
[costs]
invoke = 3

[[policies]]
name = "requests"
rate = "60/minute;1000/day"
strategy = "moving"
tiers = { gold = "600/minute", inside = "off" }

[[policies]]
name = "concurrency"
concurrency = 10
tiers = { gold = 50, inside = "off" }

[[policies]]
name = "house"
concurrency = 500
per = "all"
shadow = true

[[policies]]
name = "tokens"
tokens = "200000/hour"
per = "tenant"
strategy = "fixed"
"""


def test_every_part_of_a_policy_is_read() -> None:
    """Amount, window, strategy, whose, what unit, what it costs, shadow or not."""
    quotas = parse_policies(WHOLE).plan("invoke").quotas

    told = [(q.name, q.amount, q.window, q.strategy, q.per, q.unit, q.cost, q.shadow) for q in quotas]
    assert told == [
        ("requests-60s", 60, 60, Strategy.MOVING, Per.PRINCIPAL, Unit.REQUESTS, 3, False),
        ("requests-86400s", 1000, 86_400, Strategy.MOVING, Per.PRINCIPAL, Unit.REQUESTS, 3, False),
        ("concurrency", 10, 0, Strategy.CONCURRENCY, Per.PRINCIPAL, Unit.RUNS, 1, False),
        ("house", 500, 0, Strategy.CONCURRENCY, Per.ALL, Unit.RUNS, 1, True),
        ("tokens", 200_000, 3600, Strategy.FIXED, Per.TENANT, Unit.TOKENS, 0, False),
    ]


def test_only_runs_hold_slots_and_cost_tokens() -> None:
    """What asks about threads takes no slot and no tokens, and costs one request."""
    quotas = parse_policies(WHOLE).plan("threads.list").quotas

    assert [(quota.policy, quota.cost) for quota in quotas] == [("requests", 1), ("requests", 1)]


@pytest.mark.parametrize(
    ("tier", "rate", "amounts"),
    [
        ("default", None, [60, 1000, 10, 500, 200_000]),
        ("unknown", None, [60, 1000, 10, 500, 200_000]),
        ("gold", None, [600, 50, 500, 200_000]),
        ("inside", None, [500, 200_000]),
        ("gold", "5/second", [5, 50, 500, 200_000]),
        ("default", "off", [10, 500, 200_000]),
    ],
)
def test_a_tier_and_an_own_rate_replace_amounts(tier: str, rate: str | None, amounts: list[int]) -> None:
    """A tier's rates replace the policy's; a caller's own replaces those of `requests`, whatever his tier."""
    plan = parse_policies(WHOLE).plan("invoke", tier, rate)

    assert [quota.amount for quota in plan.quotas] == amounts


def test_an_own_rate_counts_without_a_policy_for_it() -> None:
    """Who was given a rate is held to it, though nobody else has one."""
    policies = Policies(read_rates=read_own)

    assert not policies.plan("invoke").quotas
    assert [quota.amount for quota in policies.plan("invoke", rate="7/minute").quotas] == [7]


def test_an_own_rate_too_large_to_move_slides() -> None:
    """A moving window keeps each request; a caller's own rate cannot make it keep a million."""
    policies = Policies([Policy(name="requests", rates=((5, 60),), strategy=Strategy.MOVING)], read_rates=read_own)

    strategies = [policies.plan("invoke", rate=rate).quotas[0].strategy for rate in ("10000/minute", "10001/minute")]

    assert strategies == [Strategy.MOVING, Strategy.SLIDING]


@pytest.mark.parametrize("rate", ["999999999/9999 days", "1/second;1/minute;1/hour;1/day", "off"])
def test_every_rate_of_the_form_can_be_read(rate: str) -> None:
    """What a key or a token may hold never fails later, at a request."""
    assert RATE.fullmatch(rate)
    read_own(rate)


def test_plans_are_remembered_and_bounded() -> None:
    """The same caller's plan is the same object; a million rates in tokens do not fill the memory."""
    policies = parse_policies(WHOLE)

    assert policies.plan("invoke") is policies.plan("invoke")
    for number in range(1, 5000):
        policies.plan("invoke", rate=f"{number}/minute")
    assert len(policies._plans) <= 2000


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("policies = 3", ["policies: "]),
        ("nonsense", ["not TOML"]),
        ('[[policies]]\nname = "a"', ["must have one of rate, concurrency and tokens"]),
        ('[[policies]]\nname = "a"\nrate = "1/day"\ntokens = "1/day"', ["must have one of"]),
        ('[[policies]]\nname = "a"\nrate = "1/moon"\nper = "moon"', ["policies.0.rate: must be", "policies.0.per: "]),
        ('[[policies]]\nname = "A b"\nconcurrency = 0', ["policies.0.name: ", "policies.0.concurrency: must be"]),
        ('[[policies]]\nname = "a"\nconcurrency = 1\nstrategy = "fixed"', ["concurrency has no strategy"]),
        ('[[policies]]\nname = "a"\ntokens = "1/day"\nstrategy = "moving"', ["tokens are counted fixed or sliding"]),
        ('[[policies]]\nname = "a"\nrate = "10001/day"\nstrategy = "moving"', ["at most 10000"]),
        ('[[policies]]\nname = "a"\nrate = "1/day"\ntiers = { gold = "x" }', ["must be `off` or amounts"]),
        ('[[policies]]\nname = "a"\nconcurrency = 1\ntiers = { gold = 0 }', ["a number of runs"]),
        ('[[policies]]\nname = "a"\nrate = "1/day"\noperations = ["fly"]', ["must be some of"]),
        ('[[policies]]\nname = "a"\nrate = "1/day"\nshadow = "yes"', ["policies.0.shadow: "]),
        ('[[policies]]\nname = "a"\nrate = "1/day"\nlimit = 3', ["policies.0.limit: "]),
        ('[[policies]]\nname = "a"\nrate = "1/day"\n' * 2, ["two policies are named a"]),
        ('[costs]\ninvoke = 2\n[[policies]]\nname = "a"\nrate = "1/day"', ["invoke costs more than a has"]),
        ("[costs]\ninvoke = 0\nfly = 1.5", ["costs.invoke: ", "costs.fly: "]),
        ("[costs]\nfly = 1", ["fly is no operation"]),
    ],
)
def test_every_fault_is_told_at_once(text: str, sentences: list[str]) -> None:
    """With its place in the file, in words that say what would be right."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the sentences are below
        parse_policies(text)

    assert not [sentence for sentence in sentences if sentence not in str(refused.value)]


def test_a_share_is_a_part_of_the_amount_and_at_least_one() -> None:
    """Each of four proxies enforces a quarter; together that is no more than the whole, if that is 4 or more."""
    shares = parse_policies(WHOLE).shared_by(4)

    amounts = [quota.amount for quota in shares.plan("invoke").quotas]
    own = [quota.amount for quota in shares.plan("ping", rate="3/second;9/minute").quotas]

    assert (amounts, own) == ([15, 250, 2, 125, 50_000], [1, 2])


def test_a_share_has_room_for_one_request() -> None:
    """What costs three fits in a quarter of eight, or nobody could ever ask for it without Redis."""
    text = '[costs]\ninvoke = 3\n[[policies]]\nname = "requests"\nrate = "8/minute"'
    shares = parse_policies(text).shared_by(4)

    amounts = [shares.plan(name).quotas[0].amount for name in ("invoke", "ping")]

    assert amounts == [3, 2]


@pytest.mark.parametrize("rate", ["10001/minute", "9/minute", "20000/day;5/second"])
def test_a_share_is_counted_as_the_whole_is(rate: str) -> None:
    """Under the same key: what was admitted without Redis is charged there afterwards."""
    whole = Policies([Policy(name="requests", rates=((5, 60),), strategy=Strategy.MOVING)], read_rates=read_own)

    of_whole, of_share = (each.plan("invoke", rate=rate).quotas for each in (whole, whole.shared_by(4)))

    assert [(q.key, q.strategy) for q in of_share] == [(q.key, q.strategy) for q in of_whole]


def test_the_fields_name_each_unit() -> None:
    """Requests have no unit, runs and tokens have; what is in shadow is not told."""
    plan = parse_policies(WHOLE).plan("invoke", "gold")

    assert plan.policy_field == (
        b'"requests";q=600;w=60, "concurrency";q=50;qu="concurrent-requests", "tokens";q=200000;w=3600;qu="tokens"'
    )
