"""Admission: whether a request fits in every quota of its plan, and the lease that it then holds.

Decides before a body is read. Asks Redis where there is one; without it, the named policy decides (ADR 15 and 16).
"""

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from proxy.leases import HeldLease, NoLease
from proxy.limitsettings import LimitSettings, Without
from proxy.localtier import LocalTier
from proxy.model import Headers, Lease, Principal
from proxy.operations import Operation
from proxy.outages import LimitsUnavailable, RedisDown
from proxy.policies import Per, Plan, Policies, Strategy
from proxy.standings import Standing, fields_of, refusal

if TYPE_CHECKING:
    from proxy.redistier import SharedTier

log: Final = logging.getLogger("agentflow_proxy.limits")
SHADOW_SECONDS: Final = 10.0
"""Between two lines of one policy in shadow: what it would refuse may be every request."""


class Limits:
    """Every policy of this deployment. `partition_of` hashes names; `clock` gives Unix seconds.

    `shared` counts for all replicas; while it is down, `without` says what is done by each of the `replicas`.
    Where nobody counts for all, each of several `workers` admits its share.
    """

    def __init__(  # noqa: PLR0913  it is what the settings say of limits
        self,
        policies: Policies,
        *,
        partition_of: Callable[[str], str],
        local: LocalTier,
        shared: "SharedTier | None" = None,
        without: Without = "local",
        replicas: int = 1,
        workers: int = 1,
        legacy_headers: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._partition_of = partition_of
        self._local = local
        self._shared = shared
        self._without = without
        self._replicas = replicas * workers
        self._workers = workers
        self._legacy = legacy_headers
        self._clock = clock
        self._nonce = secrets.token_hex(8)
        self._number = 0
        self.decisions: dict[tuple[str, str], int] = {}
        """How often each policy `admitted`, `refused` or `would_refuse`; for whoever counts."""
        self._shadowed: dict[str, tuple[float, int]] = {}
        """By policy: when `would_refuse` was logged last, and how often it was not since then."""
        self.replace(policies)

    def replace(self, policies: Policies) -> None:
        """Go on with other policies; what was counted under a name that stays still counts."""
        self._policies = policies if self._shared is not None else policies.shared_by(self._workers)
        self._shares = policies.shared_by(self._replicas)
        if self._shared is not None:
            self._shared.lay_out(policies)

    @property
    def lack(self) -> str:
        """Name Redis when everybody is refused without it; empty otherwise."""
        return "limits_down" if self.is_degraded and self._without == "refuse" else ""

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Keep leases and charges told to Redis, if there is one, as long as the context lasts."""
        async with self._shared.watching() if self._shared is not None else nullcontext():
            yield

    @property
    def is_degraded(self) -> bool:
        """Whether decisions are made without Redis, though there should be one."""
        return self._shared is not None and self._shared.is_down

    async def admit(self, principal: Principal, payer: str, operation: Operation) -> Lease:
        """Charge every quota of the request, or none; give its lease. Raises RateExceeded or LimitsUnavailable.

        `payer` is the partition of who is charged.
        """
        plan = self._policies.plan(operation.name, principal.tier, principal.rate)
        if not plan.quotas:
            return NoLease([])
        keys = self.keys_of(plan, payer, principal.tenant)
        if self._shared is None:
            admitted, standings = self._local.decide(plan, keys)
        else:
            self._number += 1
            lease_id = f"{self._nonce}{self._number:x}"
            if not self._shared.is_down:
                try:
                    admitted, standings = await self._shared.decide(plan, keys, lease_id)
                except RedisDown:
                    return self._admit_without(principal, operation, keys, lease_id)
            else:
                return self._admit_without(principal, operation, keys, lease_id)
            if plan.holds:
                fields = self._conclude(plan, standings, principal, admitted=admitted)
                fit = [standing.fits for standing in standings]
                return HeldLease(fields, self._shared, plan, keys=keys, fit=fit, lease_id=lease_id)
        fields = self._conclude(plan, standings, principal, admitted=admitted)
        if not plan.holds:
            return NoLease(fields)
        return HeldLease(fields, self._local, plan, keys=keys, fit=[standing.fits for standing in standings])

    def keys_of(self, plan: Plan, payer: str, tenant: str) -> list[str]:
        """Give the key of each quota's counts; what is in braces decides the hash slot in a cluster."""
        if plan.is_per_principal:
            return [f"{{{payer}}}:{quota.key}" for quota in plan.quotas]
        whole = {Per.PRINCIPAL: payer, Per.TENANT: self._partition_of(tenant) if tenant else payer, Per.ALL: "all"}
        return [f"{{{whole[quota.per]}}}:{quota.key}" for quota in plan.quotas]

    def _admit_without(self, principal: Principal, operation: Operation, keys: Sequence[str], lease_id: str) -> Lease:
        assert self._shared is not None  # noqa: S101  only degraded then
        if self._without == "refuse":
            raise LimitsUnavailable
        plan = self._shares.plan(operation.name, principal.tier, principal.rate)
        fields: Headers = []
        if self._without == "local":
            admitted, standings = self._local.decide(plan, keys)
            fields = self._conclude(plan, standings, principal, admitted=admitted)
            fit = [standing.fits for standing in standings]
        else:
            fit = [True] * len(keys)
        for quota, key, each in zip(plan.quotas, keys, fit, strict=True):
            if each and quota.strategy is Strategy.CONCURRENCY:
                if self._without == "allow":
                    self._local.enter(key)
                self._shared.hold(key, lease_id)
            elif each and quota.cost:
                self._shared.owe(quota, key, quota.cost)
        return HeldLease(fields, self._shared, plan, keys=keys, fit=fit, lease_id=lease_id)

    def _conclude(self, plan: Plan, standings: Sequence[Standing], principal: Principal, *, admitted: bool) -> Headers:
        """Count the decision, and give the fields that tell it, or raise the refusal."""
        decisions = self.decisions
        for quota, standing in zip(plan.quotas, standings, strict=True):
            outcome = "admitted"
            if not standing.fits:
                outcome = "would_refuse" if quota.shadow else "refused"
                if quota.shadow:
                    self._tell_shadow(quota.name, principal, admitted=admitted)
            elif not admitted:
                continue
            key = (quota.policy, outcome)
            decisions[key] = decisions.get(key, 0) + 1
        fields = fields_of(plan, standings, legacy_at=self._clock() if self._legacy else None)
        if not admitted:
            raise refusal(plan, standings, fields)
        return fields

    def _tell_shadow(self, policy: str, principal: Principal, *, admitted: bool) -> None:
        now = self._clock()
        last, untold = self._shadowed.get(policy, (-SHADOW_SECONDS, 0))
        if 0 <= now - last < SHADOW_SECONDS:
            self._shadowed[policy] = last, untold + 1
            return
        self._shadowed[policy] = now, 0
        told = {"policy": policy, "principal": principal.name, "admitted": admitted, "untold": untold}
        log.info("limits.would_refuse", extra={"fields": told})


def limits_of(
    settings: LimitSettings, *, partition_of: Callable[[str], str], clock: Callable[[], float] = time.time
) -> Limits:
    """Build what the settings ask for; connects to nothing yet."""
    local = LocalTier(clock=clock)
    return Limits(
        settings.policies(),
        partition_of=partition_of,
        local=local,
        shared=shared_tier(settings, local),
        without=settings.limits_without_redis,
        replicas=settings.replicas,
        workers=settings.workers,
        legacy_headers=settings.legacy_rate_headers,
        clock=clock,
    )


def shared_tier(settings: LimitSettings, local: LocalTier) -> "SharedTier | None":
    """Build the counts on Redis; None without one."""
    if settings.redis_url is None:
        return None
    from proxy.redisclient import Courier  # noqa: PLC0415  only where there is Redis: its client is 9 MiB
    from proxy.redistier import SharedTier  # noqa: PLC0415  as above

    return SharedTier(
        Courier(settings.redis_url.get_secret_value(), timeout=settings.redis_timeout_seconds),
        local,
        prefix=settings.redis_prefix,
        lease_seconds=settings.lease_seconds,
        without=settings.limits_without_redis,
    )
