"""JSON Web Tokens: proving a caller's, and signing the short internal one that the sidecar trusts.

A caller's token is never passed on, logged or kept in clear.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

import jwt

from proxy.claims import accept_claims
from proxy.errors import CredentialInvalid
from proxy.issuers import Issuer
from proxy.jose import UnprovenToken, read_token
from proxy.model import Principal
from proxy.publickeys import KeySource, Signatures
from proxy.revocations import RevocationList, Revocations

ALGORITHM: Final = "HS256"
INTERNAL_LIFETIME: Final = 60
"""Seconds an internal token lives; one is reused for the first half."""
_REMEMBERED: Final = 10_000
_A_DAY: Final = 86_400


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


class TokenVerifier:
    """Proves the tokens of `issuers`; a proven one is remembered by the SHA-256 of the whole until it expires.

    Each issuer comes with its keys, and nothing is remembered for longer than they last. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        issuers: Iterable[tuple[Issuer, KeySource]],
        clock: Callable[[], float],
        revocations: Revocations | None = None,
    ) -> None:
        self._issuers = {issuer.rules.issuer: (issuer, keys) for issuer, keys in issuers}
        self._clock = clock
        self._signatures = Signatures()
        self._revocations = revocations or RevocationList()
        self._proven: Memory[Principal] = Memory()
        self._version = self._revocations.version()

    def recall(self, token: str) -> Principal | None:
        """Give the principal of a token that was proven before, has not expired and is not revoked since."""
        if (version := self._revocations.version()) != self._version:
            self._version = version
            self._proven = Memory()
        return self._proven.recall(_fingerprint(token), self._clock())

    async def prove(self, text: str) -> Principal:
        """Prove a token; waits only where its issuer's keys must be fetched.

        Raises CredentialInvalid with the reason for the log only, KeysUnavailable when its keys cannot be had.
        """
        token = read_token(text)
        issuer, keys = self._issuer_of(token)
        if token.algorithm not in issuer.algorithms:
            raise CredentialInvalid(reason="alg is another")
        if token.type not in issuer.rules.types:
            raise CredentialInvalid(reason="typ is another")
        found = await keys.find(token.key_id, token.algorithm)
        if not found:
            raise CredentialInvalid(reason="no key for its kid and alg")
        if not self._signatures.prove(token, found):
            raise CredentialInvalid(reason="signature")
        claimed = accept_claims(token.claims, issuer.rules, self._clock())
        version = self._revocations.version()
        subject, told = claimed.principal.subject, claimed.token_id
        if self._revocations.covers(issuer=claimed.issuer, subject=subject, token_id=told, issued=claimed.issued):
            raise CredentialInvalid(reason="revoked")
        if version == self._version:
            lasting = self._clock() + min(_A_DAY, keys.lasting)
            self._proven.keep(_fingerprint(text), claimed.principal, min(claimed.expires, lasting))
        return claimed.principal

    def _issuer_of(self, token: UnprovenToken) -> tuple[Issuer, KeySource]:
        """Choose whose rules a token must satisfy: those of the issuer it names, or those that name none."""
        named = token.claims.get("iss")
        found = self._issuers.get(named) if isinstance(named, str) else None
        found = found or self._issuers.get(None)
        if found is None:
            raise CredentialInvalid(reason="iss is another")
        return found


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
        whom = f"{len(user_id)}:{user_id}:{principal.subject}"  # a tenant is one user to the sidecar, of many subjects
        signed = self._signed.recall(whom, now)
        if signed is None:
            who = {"user_id": user_id, "sub": principal.subject}
            times = {"iat": int(now), "exp": int(now) + INTERNAL_LIFETIME}
            signed = jwt.encode(who | times | self._fixed, self._secret, ALGORITHM).encode()
            self._signed.keep(whom, signed, int(now) + INTERNAL_LIFETIME / 2)
        return signed


def issue_token(issuer: Issuer, *, subject: str, scopes: frozenset[str], now: float, lifetime: int) -> str:
    """Sign a caller's token with the newest of the issuer's secrets, `lifetime` seconds long."""
    claims = {"sub": subject, "iat": int(now), "exp": int(now) + lifetime, "scope": " ".join(sorted(scopes))}
    named = _present({"iss": issuer.rules.issuer, "aud": issuer.rules.audience})
    return jwt.encode(claims | named, issuer.secrets[-1], ALGORITHM)


def _present(claims: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in claims.items() if value is not None}


def _fingerprint(token: str) -> bytes:
    return hashlib.sha256(token.encode("ascii")).digest()
