"""JSON Web Tokens: proving a caller's, and signing the short internal one that the sidecar trusts.

The only room that imports `jwt`; a caller's token is never passed on, logged or kept in clear.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import jwt

from proxy.errors import CredentialInvalid
from proxy.model import CredentialKind, Principal

ALGORITHM: Final = "HS256"
INTERNAL_LIFETIME: Final = 60
"""Seconds an internal token lives; one is reused for the first half."""
_DAY: Final = 86_400
_END_OF_TIME: Final = 253_402_300_800
"""The year 10000, in Unix seconds."""
MAX_SUBJECT_LENGTH: Final = 255
_REMEMBERED: Final = 10_000


class Memory[Value]:
    """A bounded map of values with an expiry, oldest dropped first. Keys are digests, never credentials."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._size = size
        self._values: OrderedDict[bytes | str, tuple[float, Value]] = OrderedDict()

    def recall(self, key: bytes | str, now: float) -> Value | None:
        """Give what is remembered under `key` and not expired at `now` (Unix seconds)."""
        entry = self._values.get(key)
        return entry[1] if entry is not None and now < entry[0] else None

    def keep(self, key: bytes | str, value: Value, expires: float) -> None:
        """Remember `value` until `expires` (Unix seconds)."""
        self._values[key] = (expires, value)
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a caller's token must satisfy (RFC 7519, RFC 8725); `leeway` in seconds."""

    secret: str
    issuer: str | None
    audience: str | None
    leeway: float


class TokenVerifier:
    """Proves callers' tokens; a proven one is remembered by the SHA-256 of the whole until it expires."""

    def __init__(self, rules: TokenRules, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._proven: Memory[Principal] = Memory()
        self._required = ["exp", "sub"]
        if rules.issuer is not None:
            self._required.append("iss")
        if rules.audience is not None:
            self._required.append("aud")

    def recall(self, token: str) -> Principal | None:
        """Give the principal of a token that was proven before and has not expired."""
        return self._proven.recall(_fingerprint(token), self._clock())

    def verify(self, token: str) -> Principal:
        """Prove `token`. Raises CredentialInvalid with the reason for the log only."""
        rules = self._rules
        try:
            decoded = jwt.decode_complete(
                token,
                rules.secret,
                algorithms=[ALGORITHM],
                issuer=rules.issuer,
                audience=rules.audience,
                options={
                    "require": self._required,
                    "verify_aud": rules.audience is not None,
                    # Times are checked below, by our clock, and only as numbers.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError) as error:
            raise CredentialInvalid(reason=type(error).__name__) from error
        if "crit" in decoded["header"]:  # RFC 7515 §4.1.11: we understand no extension
            raise CredentialInvalid(reason="crit")
        claims = decoded["payload"]
        now = self._clock()
        expires = _seconds(claims, "exp") + rules.leeway
        if now >= expires:
            raise CredentialInvalid(reason="expired")
        for name in ("nbf", "iat"):
            if name in claims and _seconds(claims, name) - rules.leeway > now:
                raise CredentialInvalid(reason=f"{name} is in the future")
        principal = principal_of(claims)
        self._proven.keep(_fingerprint(token), principal, min(expires, now + _DAY))
        return principal


def _seconds(claims: Mapping[str, object], name: str) -> float:
    """Read a NumericDate (RFC 7519 §2): PyJWT would take one written as text."""
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _END_OF_TIME:
        raise CredentialInvalid(reason=f"{name} is no time")
    return value


def principal_of(claims: Mapping[str, object]) -> Principal:
    """Read the principal from proven claims; scopes as in RFC 8693 §4.2 (`scope`) or a list (`scopes`).

    Raises CredentialInvalid when the subject is no plain, printable text or the scopes are neither.
    """
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT_LENGTH or not subject.isprintable():
        raise CredentialInvalid(reason="sub is not printable text")
    issuer = claims.get("iss", "")
    if not isinstance(issuer, str) or not issuer.isprintable():
        raise CredentialInvalid(reason="iss is not text")
    return Principal(
        subject=subject,
        name=subject,
        namespace=f"jwt:{len(issuer)}:{issuer}:{subject}",
        scopes=frozenset(_scopes(claims)),
        kind=CredentialKind.JWT,
    )


def _scopes(claims: Mapping[str, object]) -> list[str]:
    scopes = claims.get("scope", claims.get("scopes", ""))
    if isinstance(scopes, str):
        return scopes.split()
    if isinstance(scopes, list) and all(isinstance(scope, str) for scope in scopes):
        return scopes
    raise CredentialInvalid(reason="scope is neither text nor a list of texts")


class InternalIdentity:
    """Signs who the caller is for the sidecar: `user_id`, `iss` and `aud` where given, and `exp` 60 s ahead.

    A sidecar without JWT_AUDIENCE refuses every token that has an `aud`, so both must be told of it.
    """

    def __init__(self, secret: str, *, issuer: str | None, audience: str | None, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._fixed = _present({"iss": issuer, "aud": audience})
        self._clock = clock
        self._signed: Memory[bytes] = Memory()

    def token(self, principal: Principal) -> bytes:
        """Give a token for `principal` that lives at least another 30 s; its `user_id` is the namespace."""
        now = self._clock()
        user_id = principal.namespace
        signed = self._signed.recall(user_id, now)
        if signed is None:
            who = {"user_id": user_id, "sub": principal.subject}
            times = {"iat": int(now), "exp": int(now) + INTERNAL_LIFETIME}
            signed = jwt.encode(who | times | self._fixed, self._secret, ALGORITHM).encode()
            self._signed.keep(user_id, signed, int(now) + INTERNAL_LIFETIME / 2)
        return signed


def issue_token(rules: TokenRules, *, subject: str, scopes: frozenset[str], now: float, lifetime: int) -> str:
    """Sign a caller's token under `rules`, `lifetime` seconds long, for the `token` command."""
    claims = {"sub": subject, "iat": int(now), "exp": int(now) + lifetime, "scope": " ".join(sorted(scopes))}
    return jwt.encode(claims | _present({"iss": rules.issuer, "aud": rules.audience}), rules.secret, ALGORITHM)


def _present(claims: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in claims.items() if value is not None}


def _fingerprint(token: str) -> bytes:
    return hashlib.sha256(token.encode("ascii")).digest()
