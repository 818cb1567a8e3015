"""The commands `limits show|reset`: what a principal has left of each policy, counted on Redis, and beginning anew.

Shows nothing of a process's own counts: those are in the answers' RateLimit fields only.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from proxy.admission import Limits, shared_tier
from proxy.environment import SettingsError, load
from proxy.localtier import LocalTier
from proxy.operations import OPERATIONS
from proxy.outages import RedisDown
from proxy.policies import Plan, Unit, plan_of
from proxy.tenancy import tag_of

if TYPE_CHECKING:
    from proxy.redistier import SharedTier

_WHOM = "key:ID of an API key, jwt:SUB of a token with PROXY_JWT_ISSUER, jwt:ISSUER SUB (one argument) of another's"


def add_commands(commands: Any) -> None:  # noqa: ANN401  argparse's own type has no public name
    """Add `limits` to `commands`."""
    parsers = commands.add_parser("limits", help="show and reset what is counted on Redis").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for name, command, text in (
        ("show", show, "print what a principal has left of each policy"),
        ("reset", reset, "forget what a principal's rates and budgets have counted; runs go on being counted"),
    ):
        parser = parsers.add_parser(name, help=text, description=text)
        parser.add_argument("--principal", required=True, help=_WHOM)
        parser.add_argument("--tenant", default="", help="the tenant's name, for policies per tenant")
        parser.add_argument("--tier", default="default")
        parser.add_argument("--rate", help="the caller's own rate, if there is one")
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(command=command)


def show(options: argparse.Namespace) -> int:
    """Print one line for each policy and window."""

    async def shown(tier: "SharedTier", plan: Plan, keys: list[str]) -> list[dict[str, object]]:
        standings = await tier.peek(plan, keys) if keys else []
        return [
            {
                "policy": quota.name,
                "per": quota.per,
                "unit": quota.unit,
                "amount": quota.amount,
                "window_seconds": quota.window or None,
                "used": quota.amount - standing.remaining,
                "remaining": standing.remaining,
                "grows_in_seconds": standing.grows or None,
                "shadow": quota.shadow,
            }
            for quota, standing in zip(plan.quotas, standings, strict=True)
        ]

    rows = _on_redis(options, shown)
    if options.json:
        _say(json.dumps(rows))
        return 0
    _say(f"{'POLICY':<24} {'PER':<10} {'USED':>10} {'OF':>10} {'WINDOW':>9}  UNIT")
    for row in rows:
        window = f"{row['window_seconds']} s" if row["window_seconds"] else "-"
        unit = f"{row['unit']}{', shadow' if row['shadow'] else ''}"
        _say(f"{row['policy']:<24} {row['per']:<10} {row['used']:>10} {row['amount']:>10} {window:>9}  {unit}")
    return 0


def reset(options: argparse.Namespace) -> int:
    """Forget the principal's own counts, and print of how many quotas there were any."""

    async def forgotten(tier: "SharedTier", plan: Plan, keys: list[str]) -> int:
        own = [
            key
            for quota, key in zip(plan.quotas, keys, strict=True)
            if quota.per == "principal" and quota.unit is not Unit.RUNS
        ]
        return await tier.forget(own) if own else 0

    count = _on_redis(options, forgotten)
    _say(json.dumps({"forgotten": count}) if options.json else f"{count} counts forgotten")
    return 0


def _on_redis[Result](
    options: argparse.Namespace, act: Callable[["SharedTier", Plan, list[str]], Awaitable[Result]]
) -> Result:
    """Do something with every quota of the principal, whatever it calls. Raises SettingsError."""
    settings = load(os.environ)
    secret = settings.secret_of_tags()
    policies = settings.policies()

    async def run() -> Result:
        local = LocalTier()
        tier = shared_tier(settings, local)
        if tier is None:
            raise SettingsError(["PROXY_REDIS_URL: is required; without it each process counts for itself"])
        limits = Limits(policies, partition_of=lambda name: tag_of(name, secret), local=local, shared=tier)
        plans = [policies.plan(row.name, options.tier, options.rate) for row in OPERATIONS]
        plan = plan_of(list({quota.key: quota for plan in plans for quota in plan.quotas}.values()))
        issuer = settings.jwt_issuer or ""
        payer = tag_of(_namespace(options.principal, issuer), secret)
        tenant = f"tenant:{len(issuer)}:{issuer}:{options.tenant}" if options.tenant else ""
        try:
            await tier.reach()
            return await act(tier, plan, limits.keys_of(plan, payer, tenant))
        except RedisDown as problem:
            raise SettingsError([f"PROXY_REDIS_URL: Redis does not answer: {problem.reason}"]) from problem
        finally:
            await tier.close()

    return asyncio.run(run())


def _namespace(name: str, issuer: str) -> str:
    """Give the name that a principal's quotas are counted under, before it is hashed."""
    kind, _, rest = name.partition(":")
    if kind == "key" and rest:
        return name
    if kind != "jwt" or not rest:
        raise SettingsError([f"--principal: must be {_WHOM}"])
    whose, space, subject = rest.rpartition(" ")
    issuer = whose if space else issuer
    return f"jwt:{len(issuer)}:{issuer}:{subject}"


def _say(text: str) -> None:
    print(text)
