"""Which quotas a request must fit in: policies by operation, tier and the caller's own rate, laid out as a plan.

Pure: reads no file, no clock and no count; `limitsettings` reads policies, `limits` and `redistier` keep counts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from proxy.operations import OPERATIONS, Kind

_AMOUNT: Final = r"[1-9][0-9]{0,8}/([1-9][0-9]{0,3} ?)?(second|minute|hour|day)s?"
RATE: Final = re.compile(rf"^(off|{_AMOUNT}(;{_AMOUNT}){{0,3}})$", re.ASCII)
"""How a key or a token writes a rate of its own."""
MOST_PLANS: Final = 2_000
MOST_MOMENTS: Final = 10_000
"""The largest amount of a moving window, which keeps every request."""
OWN_RATE: Final = "requests"
"""The policy whose rate a key's or a token's own rate replaces."""
RUNS: Final = frozenset(row.name for row in OPERATIONS if row.kind in (Kind.RUN, Kind.AG_UI, Kind.DUPLEX))
_COSTS: Final = {row.name: row.cost for row in OPERATIONS}


class Strategy(StrEnum):
    """How a quota counts; all windows but the moving one are aligned to the clock."""

    FIXED = "fixed"
    """Anew in each window."""
    SLIDING = "sliding"
    """This window, and the last one as far as it is still covered."""
    MOVING = "moving"
    """Every single request, as long as a window lasts."""
    CONCURRENCY = "concurrency"
    """What runs now."""


class Unit(StrEnum):
    """What a quota is an amount of, as the wire calls it."""

    REQUESTS = "requests"
    RUNS = "concurrent-requests"
    TOKENS = "tokens"


class Per(StrEnum):
    """What a quota counts per."""

    PRINCIPAL = "principal"
    TENANT = "tenant"
    ALL = "all"


type Rate = tuple[int, int]
"""An amount, and its window in seconds; 0 for what has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A named rule. No rates: off. `tiers` replaces the rates for the callers of a tier; `shadow` refuses nobody."""

    name: str
    rates: tuple[Rate, ...]
    unit: Unit = Unit.REQUESTS
    strategy: Strategy = Strategy.SLIDING
    per: Per = Per.PRINCIPAL
    operations: frozenset[str] | None = None
    tiers: Mapping[str, tuple[Rate, ...]] | None = None
    shadow: bool = False

    def rates_of(self, tier: str) -> tuple[Rate, ...]:
        """Give the rates for a tier."""
        return self.rates if self.tiers is None else self.tiers.get(tier, self.rates)


@dataclass(frozen=True, slots=True)
class Quota:
    """An amount of a policy for one window, and what one request takes of it.

    `name` is what the wire calls it, `key` what its counts are kept under beside the partition. `cost` is 0 where
    what is taken is known only later: then something must be left.
    """

    policy: str
    name: str
    key: str
    per: Per
    strategy: Strategy
    unit: Unit
    amount: int
    window: int
    cost: int
    shadow: bool

    @property
    def need(self) -> int:
        """What must be left for a request to be admitted."""
        return self.cost or 1

    def shared_by(self, replicas: int) -> "Quota":
        """Give one replica's share: a part of the amount, but room for one request, if the whole has that."""
        return replace(self, amount=max(self.amount // replicas, min(self.need, self.amount)))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Every quota that one kind of request must fit in, with what is the same for each of them.

    `policy_field` is RateLimit-Policy, empty where no quota is told. `spec` is what the Redis script reads.
    """

    quotas: tuple[Quota, ...]
    policy_field: bytes
    spec: str
    is_per_principal: bool
    holds: bool
    """Whether something is held, or charged, while a run lasts."""


class Policies:
    """All policies of a deployment. `read_rates` reads the notation of a caller's own rate.

    With several `replicas` plans hold one replica's share of every amount: a part of it, but room for one request.
    """

    def __init__(
        self,
        policies: Sequence[Policy] = (),
        *,
        costs: Mapping[str, int] | None = None,
        read_rates: Callable[[str], tuple[Rate, ...]],
        replicas: int = 1,
    ) -> None:
        self.policies = tuple(policies)
        self.costs = dict(costs or {})
        self._read_rates = read_rates
        self._replicas = replicas
        self._plans: dict[tuple[str, str, str | None], Plan] = {}

    def plan(self, operation: str, tier: str = "default", rate: str | None = None) -> Plan:
        """Give the plan for an operation's callers of a tier, or with a rate of their own. Remembered, bounded."""
        key = (operation, tier, rate)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = plan_of(self._quotas(operation, tier, rate))
        return plan

    def shared_by(self, replicas: int) -> "Policies":
        """Give one replica's share of every policy, callers' own rates too."""
        if replicas == 1:
            return self
        return Policies(self.policies, costs=self.costs, read_rates=self._read_rates, replicas=replicas)

    @property
    def is_per_principal(self) -> bool:
        """Whether no policy counts several principals together."""
        return all(policy.per is Per.PRINCIPAL for policy in self.policies)

    def _quotas(self, operation: str, tier: str, rate: str | None) -> list[Quota]:
        policies = list(self.policies)
        if rate is not None:
            place = next((at for at, each in enumerate(policies) if each.name == OWN_RATE), len(policies))
            own = policies[place] if place < len(policies) else Policy(name=OWN_RATE, rates=())
            rates = self._read_rates(rate)
            can_move = own.strategy is not Strategy.MOVING or all(amount <= MOST_MOMENTS for amount, _ in rates)
            strategy = own.strategy if can_move else Strategy.SLIDING
            policies[place : place + 1] = [replace(own, rates=rates, tiers=None, strategy=strategy)]
        cost = self.costs.get(operation, _COSTS.get(operation, 1))
        quotas = [
            quota
            for policy in policies
            if policy.operations is None or operation in policy.operations
            for quota in _quotas_of(policy, policy.rates_of(tier), cost)
        ]
        return quotas if self._replicas == 1 else [quota.shared_by(self._replicas) for quota in quotas]


def plan_of(quotas: Sequence[Quota]) -> Plan:
    """Lay out a plan."""
    told = ", ".join(_told(quota) for quota in quotas if not quota.shadow)
    return Plan(
        tuple(quotas),
        told.encode(),
        " ".join(f"{q.strategy[0]} {q.amount} {q.window} {q.cost} {q.shadow:d}" for q in quotas),
        is_per_principal=all(quota.per is Per.PRINCIPAL for quota in quotas),
        holds=any(quota.unit is not Unit.REQUESTS for quota in quotas),
    )


def least_of(rates: Sequence[Rate]) -> tuple[Rate, ...]:
    """Give one rate for each window: of two amounts for one window the least counts, since it is what is felt."""
    least: dict[int, int] = {}
    for amount, window in rates:
        least[window] = min(amount, least.get(window, amount))
    return tuple((amount, window) for window, amount in least.items())


def _quotas_of(policy: Policy, rates: Sequence[Rate], cost: int) -> list[Quota]:
    costs = {Unit.REQUESTS: cost, Unit.RUNS: 1, Unit.TOKENS: 0}
    return [
        Quota(
            policy.name,
            policy.name if len(rates) == 1 else f"{policy.name}-{window}s",
            f"{policy.name}:{window}{policy.strategy[0]}",
            policy.per,
            policy.strategy,
            policy.unit,
            amount,
            window,
            costs[policy.unit],
            policy.shadow,
        )
        for amount, window in rates
    ]


def _told(quota: Quota) -> str:
    window = f";w={quota.window}" if quota.window else ""
    unit = "" if quota.unit is Unit.REQUESTS else f';qu="{quota.unit}"'
    return f'"{quota.name}";q={quota.amount}{window}{unit}'
