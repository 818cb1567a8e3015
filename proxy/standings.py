"""What is left of quotas, and the RateLimit fields that tell it (draft-ietf-httpapi-ratelimit-headers).

Pure: counts come in as they were read, wherever they are kept; nothing here keeps or changes one.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from proxy.errors import RateExceeded
from proxy.model import Headers
from proxy.policies import Plan, Quota, Strategy, Unit

MICROSECONDS: Final = 1_000_000


class Standing(NamedTuple):
    """Of one quota: whether the request fits, what remains, the seconds until that grows, and until it fits.

    0 seconds: nobody knows, since it depends on when runs end.
    """

    fits: bool
    remaining: int
    grows: int
    wait: int


def weighted(previous: int, current: int, share: float) -> float:
    """Estimate the requests of the last window: this one's, and of the one before the `share` it still covers."""
    return previous * share + current


def left_of(window: int, now: float) -> float:
    """Give the seconds until the clock-aligned window around `now` (Unix seconds) ends: above 0, at most `window`."""
    return window - now % window


def fits(previous: int, current: int, *, limit: int, window: int, left: float) -> bool:
    """Say whether one more request fits under `limit` when `left` seconds of the window remain; past its end too."""
    if left <= 0:
        previous, current, left = current, 0, left + window
    return math.floor(weighted(previous if left > 0 else 0, current, left / window)) < limit


def seconds_to_room(previous: int, current: int, *, limit: int, window: int, left: float) -> int:
    """Give the least whole seconds, at least 1, after which one more request fits if none comes until then.

    `left` is what remains of the window, in seconds. What can never fit is told to come in two windows.
    """
    if limit <= 0:
        return 2 * window
    if current < limit:
        estimate = left - (limit - current) / max(previous, 1) * window
    else:
        estimate = left + window - limit / current * window
    wait = max(1, math.floor(estimate))
    while not fits(previous, current, limit=limit, window=window, left=left - wait):
        wait += 1
    return wait


def sliding(quota: Quota, previous: int, current: int, left: float, *, fit: bool) -> Standing:
    """Read a sliding window: its counts after the decision, and the seconds left of it."""
    amount, window = quota.amount, quota.window
    remaining = max(0, amount - math.floor(weighted(previous, current, left / window)))
    wait = 0
    if not fit:
        wait = seconds_to_room(previous, current, limit=amount - quota.need + 1, window=window, left=left)
    if not remaining:
        grows = seconds_to_room(previous, current, limit=amount, window=window, left=left)
    else:
        grows = wait or math.ceil(left)
    return Standing(fit, remaining, grows, wait)


def fixed(quota: Quota, current: int, left: float, *, fit: bool) -> Standing:
    """Read a fixed window."""
    grows = math.ceil(left)
    return Standing(fit, max(0, quota.amount - current), grows, 0 if fit else grows)


def moving(quota: Quota, count: int, grows: float, wait: float, *, fit: bool) -> Standing:
    """Read a moving window: how much is in it, the seconds until the oldest leaves, and until there is room."""
    longest = quota.window
    seconds = math.ceil(grows) if count else longest
    return Standing(fit, max(0, quota.amount - count), seconds, 0 if fit else math.ceil(wait))


def concurrent(quota: Quota, count: int, *, fit: bool) -> Standing:
    """Read how many run; nobody knows when one ends, so who waits is told to ask again in a second."""
    return Standing(fit, max(0, quota.amount - count), 0, 0 if fit else 1)


def standing_at(quota: Quota, now: int, told: Sequence[int]) -> Standing:
    """Read the four numbers that the Redis script tells of a quota, at `now` (its microseconds); see `admit.lua`."""
    fit, count, one, two = told
    if quota.strategy is Strategy.SLIDING:
        return sliding(quota, one, count, _left(quota.window, now), fit=bool(fit))
    if quota.strategy is Strategy.FIXED:
        return fixed(quota, count, _left(quota.window, now), fit=bool(fit))
    if quota.strategy is Strategy.MOVING:
        return moving(quota, count, one / MICROSECONDS, two / MICROSECONDS, fit=bool(fit))
    return concurrent(quota, count, fit=bool(fit))


def _left(window: int, now: int) -> float:
    length = window * MICROSECONDS
    return (length - now % length) / MICROSECONDS


def fields_of(plan: Plan, standings: Sequence[Standing], *, legacy_at: float | None = None) -> Headers:
    """Write the RateLimit fields; with `legacy_at` (Unix seconds, now) the older ones too.

    Those know requests only: they tell the tightest quota of these, and are not sent where there is none.
    """
    if not plan.policy_field:
        return []
    told = []
    for quota, standing in zip(plan.quotas, standings, strict=True):
        if not quota.shadow:
            seconds = f";t={standing.grows}" if standing.grows else ""
            told.append(f'"{quota.name}";r={standing.remaining}{seconds}')
    fields = [(b"ratelimit-policy", plan.policy_field), (b"ratelimit", ", ".join(told).encode())]
    pairs = zip(plan.quotas, standings, strict=True) if legacy_at is not None else ()
    requests = [pair for pair in pairs if pair[0].unit is Unit.REQUESTS and not pair[0].shadow]
    if requests and legacy_at is not None:
        quota, standing = min(requests, key=lambda pair: pair[1].remaining)
        legacy = {
            b"limit": quota.amount,
            b"remaining": standing.remaining,
            b"reset": math.ceil(legacy_at) + standing.grows,
        }
        fields += [(b"x-ratelimit-" + name, b"%d" % value) for name, value in legacy.items()]
    return fields


def refusal(plan: Plan, standings: Sequence[Standing], fields: Headers) -> RateExceeded:
    """Make the problem that tells which policies refused, and when to come again: never before any `t` of theirs."""
    violated = [
        (quota, standing)
        for quota, standing in zip(plan.quotas, standings, strict=True)
        if not standing.fits and not quota.shadow
    ]
    wait = max(max(standing.wait, 1) for _, standing in violated)
    return RateExceeded(policies=tuple(quota.name for quota, _ in violated), retry_after=wait, fields=fields)
