"""What an operator can set about limits: `PROXY_RATE_LIMIT` and its like, or policies in TOML; where they are counted.

A part of `settings`, which reads the environment. Reads only text it is given.
"""

import tomllib
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

import limits
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from proxy.operations import OPERATIONS
from proxy.policies import MOST_MOMENTS, RUNS, Per, Policies, Policy, Rate, Strategy, Unit, least_of

LONGEST_WINDOW: Final = 366 * 86_400
_LONGEST_OWN: Final = 9_999 * 86_400
MOST_AMOUNT: Final = 10**15
"""From here on the RateLimit fields cannot tell it: RFC 9651 §3.3.1 has integers of 15 digits."""
MOST_RUNS: Final = 1_000_000
RATE_FORM: Final = "must be `off` or amounts per window, such as 60/minute or 10/second;1000/day"
COUNT_FORM: Final = "must be `off` or a number of runs from 1 to 1000000"
SIMPLE: Final = ("rate_limit", "rate_strategy", "concurrency_limit", "token_limit")
"""The settings that stand for a whole text of policies."""
_NAMES: Final = frozenset(row.name for row in OPERATIONS)


def read_rates(text: str, *, longest: int = LONGEST_WINDOW) -> tuple[Rate, ...]:
    """Read amounts per window in `limits`' notation; none for `off`. `longest` is in seconds. Raises ValueError."""
    if text == "off":
        return ()
    try:
        rates = [(item.amount, item.get_expiry()) for item in limits.parse_many(text)]
    except ValueError:
        rates = []
    if not rates or any(not 0 < amount < MOST_AMOUNT or not 0 < window <= longest for amount, window in rates):
        raise ValueError(RATE_FORM)
    return least_of(rates)


def read_own(text: str) -> tuple[Rate, ...]:
    """Read a rate that was found to be of the form of `policies.RATE`."""
    return read_rates(text, longest=_LONGEST_OWN)


def read_count(value: object) -> tuple[Rate, ...]:
    """Read a number of runs at once; none for `off`. Raises ValueError."""
    if value == "off":
        return ()
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= MOST_RUNS:
        raise ValueError(COUNT_FORM)
    return ((number, 0),)


def _is_rate(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(RATE_FORM)  # noqa: TRY004  pydantic tells a ValueError
    read_rates(value)
    return value


def _is_count(value: object) -> object:
    read_count(value)
    return str(value)


def _is_redis(value: object) -> object:
    if isinstance(value, str):
        from proxy.redisclient import connect  # noqa: PLC0415  only where there is Redis: its client is 9 MiB

        connect(value)
    return value


type Without = Literal["local", "refuse", "allow"]
type RateText = Annotated[str, BeforeValidator(_is_rate)]
type CountText = Annotated[str, BeforeValidator(_is_count)]
type RedisUrl = Annotated[SecretStr, BeforeValidator(_is_redis)]
type Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
type Tier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class PolicyEntry(BaseModel):
    """One `[[policies]]` table: a rate, a number of runs at once, or a budget of model tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    rate: RateText | None = None
    concurrency: CountText | None = None
    tokens: RateText | None = None
    strategy: Literal["fixed", "sliding", "moving"] | None = None
    per: Per = Per.PRINCIPAL
    operations: frozenset[str] | None = None
    tiers: dict[Tier, str | int] = Field(default_factory=dict)
    shadow: Annotated[bool, Field(strict=True)] = False

    @field_validator("operations")
    @classmethod
    def _are_known(cls, value: frozenset[str] | None) -> frozenset[str] | None:
        if value is not None and (not value or value - _NAMES):
            raise ValueError(f"must be some of {', '.join(sorted(_NAMES))}")
        return value

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if [self.rate, self.concurrency, self.tokens].count(None) != 2:  # noqa: PLR2004  all but one
            raise ValueError("must have one of rate, concurrency and tokens")
        if self.strategy is not None and self.concurrency is not None:
            raise ValueError("concurrency has no strategy")
        if self.strategy == "moving" and self.tokens is not None:
            raise ValueError("tokens are counted fixed or sliding")
        policy = self.build()
        if policy.strategy is Strategy.MOVING:
            rates = [rate for rates in (policy.rates, *(policy.tiers or {}).values()) for rate in rates]
            if any(amount > MOST_MOMENTS for amount, _ in rates):
                raise ValueError(f"a moving window keeps each request, so its amount is at most {MOST_MOMENTS}")
        return self

    def build(self) -> Policy:
        """Make the policy. Raises ValueError for a tier's value that is none."""
        runs = self.operations
        if self.concurrency is not None:
            unit, strategy, rates = Unit.RUNS, Strategy.CONCURRENCY, read_count(self.concurrency)
            tiers = {name: read_count(value) for name, value in self.tiers.items()}
        else:
            unit = Unit.REQUESTS if self.tokens is None else Unit.TOKENS
            strategy = Strategy(self.strategy or Strategy.SLIDING)
            rates = read_rates(self.rate or self.tokens or "off")
            tiers = {name: read_rates(str(value)) for name, value in self.tiers.items()}
        if unit is not Unit.REQUESTS and runs is None:
            runs = RUNS
        return Policy(
            name=self.name,
            rates=rates,
            unit=unit,
            strategy=strategy,
            per=self.per,
            operations=runs,
            tiers=tiers,
            shadow=self.shadow,
        )


class PolicyFile(BaseModel):
    """The whole text: the policies, and what an operation costs where that is not 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policies: Annotated[tuple[PolicyEntry, ...], Field(max_length=32)] = ()
    costs: dict[str, Annotated[int, Field(ge=1, le=1000, strict=True)]] = Field(default_factory=dict)


def parse_policies(text: str) -> Policies:
    """Read policies from a TOML text. Raises ValueError that names every fault in it at once."""
    try:
        entries = PolicyFile.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"not TOML: {error}") from error
    except ValidationError as error:
        faults = (f"{_place(fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}" for fault in error.errors())
        raise ValueError("; ".join(faults)) from error
    policies = [entry.build() for entry in entries.policies]
    names = [policy.name for policy in policies]
    faults_between = [f"two policies are named {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    faults_between += [f"costs: {name} is no operation" for name in sorted(entries.costs.keys() - _NAMES)]
    faults_between += _unaffordable(policies, entries.costs)
    if faults_between:
        raise ValueError("; ".join(faults_between))
    return Policies(policies, costs=entries.costs, read_rates=read_own)


def _unaffordable(policies: list[Policy], costs: Mapping[str, int]) -> list[str]:
    """Find operations that cost more than a policy ever has."""
    return [
        f"costs: {operation} costs more than {policy.name} has"
        for operation, cost in costs.items()
        for policy in policies
        if policy.unit is Unit.REQUESTS and (policy.operations is None or operation in policy.operations)
        if any(cost > amount for rates in (policy.rates, *(policy.tiers or {}).values()) for amount, _ in rates)
    ]


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if not str(part).startswith("function-")) or "policies"


class LimitSettings(BaseModel):
    """How much callers may ask for, and where that is counted."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, arbitrary_types_allowed=True)

    rate_limit: Annotated[RateText, Field(description="per caller")] = "60/minute"
    rate_strategy: Annotated[
        Literal["fixed", "sliding", "moving"], Field(description="how PROXY_RATE_LIMIT counts")
    ] = "sliding"
    concurrency_limit: Annotated[CountText, Field(description="runs at once per caller; off")] = "off"
    token_limit: Annotated[RateText, Field(description="model tokens per caller, such as 200000/hour; off")] = "off"  # noqa: S105  an amount
    limits: Annotated[Policies | None, Field(description="[[policies]] in TOML, instead of the four above")] = None
    auth_failure_limit: Annotated[RateText, Field(description="failed credentials per address")] = "20/minute"
    legacy_rate_headers: Annotated[bool, Field(description="send X-RateLimit-… too")] = False
    redis_url: Annotated[
        RedisUrl | None, Field(description="where limits are counted for all replicas; unset: in each process")
    ] = None
    redis_prefix: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="begins each key; the same for all replicas")
    ] = "agentflow-proxy"
    redis_timeout_seconds: Annotated[
        float, Field(ge=0.005, le=5, description="for a decision; then it is made without Redis")
    ] = 0.05
    limits_without_redis: Annotated[Without, Field(description="what is done while Redis does not answer")] = "local"
    replicas: Annotated[
        int, Field(ge=1, le=1000, description="how many proxies share Redis; without it each enforces its share")
    ] = 1
    workers: Annotated[
        int, Field(ge=1, le=64, description="processes behind the one port; without Redis each enforces its share")
    ] = 1
    lease_seconds: Annotated[
        float, Field(ge=1, le=30, description="the slots of a proxy that died are free after this")
    ] = 25

    @field_validator("limits", mode="before")
    @classmethod
    def _are_policies(cls, value: object) -> object:
        return parse_policies(value) if isinstance(value, str) else value

    def failure_rates(self) -> tuple[Rate, ...]:
        """Give one worker's share of PROXY_AUTH_FAILURE_LIMIT, which each counts by itself."""
        rates = read_rates(self.auth_failure_limit)
        return tuple((max(1, amount // self.workers), window) for amount, window in rates)

    def policies(self) -> Policies:
        """Give every policy: those of the text, or those that the simple settings mean."""
        if self.limits is not None:
            return self.limits
        simple: list[Policy] = [
            Policy(name="requests", rates=read_rates(self.rate_limit), strategy=Strategy(self.rate_strategy)),
            Policy(
                name="concurrency",
                rates=read_count(self.concurrency_limit),
                unit=Unit.RUNS,
                strategy=Strategy.CONCURRENCY,
                operations=RUNS,
            ),
            Policy(name="tokens", rates=read_rates(self.token_limit), unit=Unit.TOKENS, operations=RUNS),
        ]
        return Policies(simple, read_rates=read_own)
