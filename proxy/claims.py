"""What a token whose signature holds may still be refused for, and the principal it speaks of.

Pure: decides on claims, their issuer's rules and the time; never reads a token or a key.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, TypeIs

from proxy.errors import CredentialInvalid
from proxy.model import CredentialKind, Principal
from proxy.policies import RATE

MAX_SUBJECT_LENGTH: Final = 255
_END_OF_TIME: Final = 253_402_300_799
"""The last second of the year 9999; what is beyond it is no date."""
_TIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)

type Path = tuple[str, ...]
"""Where a claim stands: its name, or the names of the objects around it first."""


@dataclass(frozen=True, slots=True)
class ClaimNames:
    """Where an issuer writes what a principal consists of; scopes at the first place that is there."""

    subject: Path = ("sub",)
    scopes: tuple[Path, ...] = (("scope",), ("scopes",))
    tenant: Path = ("tenant",)
    tier: Path = ("tier",)
    rate: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRules:
    """What an issuer's tokens must claim; times in seconds, None for no bound.

    Without `audience` a token may name none (RFC 7519 §4.1.3). `namespace` says who owns threads.
    """

    issuer: str | None = None
    audience: str | None = None
    types: frozenset[str] = frozenset({"", "jwt", "at+jwt"})
    names: ClaimNames = ClaimNames()
    leeway: float = 0
    max_age: float | None = None
    max_lifetime: float | None = None
    namespace: Literal["principal", "tenant"] = "principal"


@dataclass(frozen=True, slots=True)
class Claimed:
    """A principal, until when its token proves it (Unix seconds), and what the token can be revoked by."""

    principal: Principal
    expires: float
    issuer: str
    token_id: str | None
    issued: float | None


def accept_claims(claims: Mapping[str, Any], rules: ClaimRules, now: float) -> Claimed:
    """Hold proven claims to `rules` at `now` (Unix seconds). Raises CredentialInvalid, the reason for the log."""
    issuer = _accept_issuer(claims, rules.issuer)
    _accept_audience(claims, rules.audience)
    issued, expires = _accept_times(claims, rules, now)
    subject = _printable(claims, rules.names.subject)
    if "sub" in claims:
        _printable(claims, ("sub",))
    token_id = claims.get("jti")
    if "jti" in claims and (not isinstance(token_id, str) or not 0 < len(token_id) <= MAX_SUBJECT_LENGTH):
        _refuse("jti is not text")
    own = f"jwt:{len(issuer)}:{issuer}:{subject}"
    namespace, tenant = own, ""
    if rules.namespace == "tenant" or _is_printable(_at(claims, rules.names.tenant)):
        tenant = f"tenant:{len(issuer)}:{issuer}:{_printable(claims, rules.names.tenant)}"
    if rules.namespace == "tenant":
        namespace = tenant
    principal = Principal(
        subject=subject,
        name=subject,
        namespace=namespace,
        scopes=_scopes(claims, rules.names.scopes),
        kind=CredentialKind.JWT,
        tier=_tier(claims, rules.names.tier),
        rate=_rate(claims, rules.names.rate),
        caller="" if namespace == own else own,
        tenant=tenant,
    )
    return Claimed(principal, expires, issuer, token_id, issued)


def _accept_issuer(claims: Mapping[str, Any], required: str | None) -> str:
    issuer = claims.get("iss", "")
    if not isinstance(issuer, str) or not issuer.isprintable():
        _refuse("iss is not printable text")
    if required is not None and issuer != required:
        _refuse("iss is another")
    return issuer


def _accept_audience(claims: Mapping[str, Any], required: str | None) -> None:
    if "aud" not in claims:
        if required is not None:
            _refuse("aud is missing")
        return
    audience = claims["aud"]
    named = [audience] if isinstance(audience, str) else audience
    if not isinstance(named, list) or not named or not all(isinstance(name, str) and name for name in named):
        _refuse("aud is neither text nor a list of texts")
    if required is None:
        _refuse("aud names somebody, and PROXY_JWT_AUDIENCE is not set")
    if required not in named:
        _refuse("aud is another")


def _accept_times(claims: Mapping[str, Any], rules: ClaimRules, now: float) -> tuple[float | None, float]:
    """Give when the token was issued, and until when it counts, the leeway included."""
    issued, begins, expires = (_time(claims, name) for name in ("iat", "nbf", "exp"))
    if expires is None:
        _refuse("exp is missing")
    if now >= expires + rules.leeway:
        _refuse("expired")
    if begins is not None and begins > now + rules.leeway:
        _refuse("nbf is to come")
    if issued is not None and issued > now + rules.leeway:
        _refuse("iat is to come")
    if rules.max_lifetime is not None and expires - (now if issued is None else issued) > rules.max_lifetime:
        _refuse("lives too long")
    counts_until = expires + rules.leeway
    if rules.max_age is not None:
        if issued is None:
            _refuse("iat is missing")
        if now >= issued + rules.max_age + rules.leeway:
            _refuse("too old")
        counts_until = min(counts_until, issued + rules.max_age + rules.leeway)
    return issued, counts_until


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    """Read a NumericDate (RFC 7519 §2): a JSON number, and a time that can be."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(f"{name} is not a number")
    if not 0 <= value <= _END_OF_TIME:
        _refuse(f"{name} is no time")
    return float(value)


def _scopes(claims: Mapping[str, Any], places: tuple[Path, ...]) -> frozenset[str]:
    """Read scopes: text parted by spaces (RFC 8693 §4.2), or a list of texts."""
    scopes = next((value for place in places if (value := _at(claims, place)) is not _ABSENT), "")
    if isinstance(scopes, str):
        return frozenset(scopes.split())
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        _refuse("scope is neither text nor a list of texts")
    return frozenset(scopes)


def _tier(claims: Mapping[str, Any], place: Path) -> str:
    tier = _at(claims, place)
    if tier is _ABSENT:
        return "default"
    if not isinstance(tier, str) or not _TIER.fullmatch(tier):
        _refuse("tier is not a name")
    return tier


def _rate(claims: Mapping[str, Any], place: Path | None) -> str | None:
    rate = _ABSENT if place is None else _at(claims, place)
    if rate is _ABSENT:
        return None
    if not isinstance(rate, str) or not RATE.fullmatch(rate):
        _refuse("rate is no amount per window")
    return rate


def _printable(claims: Mapping[str, Any], place: Path) -> str:
    value = _at(claims, place)
    if not _is_printable(value):
        _refuse(f"{'.'.join(place)} is not printable text")
    return value


def _is_printable(value: object) -> TypeIs[str]:
    return isinstance(value, str) and 0 < len(value) <= MAX_SUBJECT_LENGTH and value.isprintable()


_ABSENT: Final = object()


def _at(claims: Mapping[str, Any], place: Path) -> object:
    value: object = claims
    for name in place:
        if not isinstance(value, Mapping) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def _refuse(reason: str) -> NoReturn:
    raise CredentialInvalid(reason=reason)
