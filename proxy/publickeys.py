"""Keys that prove signatures: shared secrets, PEM files, JSON Web Keys; each for one algorithm only (RFC 8725 §3.1).

Beside `tokens` the only room that imports `jwt`; never fetches a key, and never takes one from a token.
"""

import math
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import Algorithm, get_default_algorithms

from proxy.jose import UnprovenToken

SHARED: Final = frozenset({"HS256"})
PUBLIC: Final = frozenset({"RS256", "PS256", "ES256", "EdDSA"})
_RSA_BITS: Final = (2048, 8192)
_LEAST_EXPONENT: Final = 65537
_MOST_KEYS: Final = 100
_MOST_TRIED: Final = 8
_PEM: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)

type PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key, the one algorithm that it is used with, and its id if its issuer gave it one."""

    algorithm: str
    key: PublicKey | bytes = field(repr=False)
    id: str | None = None


class KeySource(Protocol):
    """Where an issuer's keys come from."""

    async def find(self, key_id: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
        """Give the keys that a token with this header may have been signed with; bounded, perhaps none.

        Raises KeysUnavailable when that cannot be said.
        """

    @property
    def lasting(self) -> float:
        """For how many seconds a proof by one of these keys may be remembered: they may be withdrawn."""


class KnownKeys:
    """Keys that are given at the start and do not change."""

    def __init__(self, keys: Iterable[VerificationKey]) -> None:
        self._keys = tuple(keys)

    async def find(self, key_id: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
        return candidates(self._keys, key_id, algorithm)

    @property
    def lasting(self) -> float:
        return math.inf


class Signatures:
    """The algorithms, as PyJWT implements them; its own reading of tokens is not used (docs/adr/0013)."""

    def __init__(self) -> None:
        known = get_default_algorithms()
        self._algorithms: dict[str, Algorithm] = {name: known[name] for name in SHARED | PUBLIC}

    def prove(self, token: UnprovenToken, keys: Iterable[VerificationKey]) -> bool:
        """Say whether one of `keys` made the token's signature with the token's algorithm."""
        algorithm = self._algorithms.get(token.algorithm)
        if algorithm is None:
            return False
        return any(
            algorithm.verify(token.signed, key.key, token.signature) for key in keys if key.algorithm == token.algorithm
        )


def candidates(keys: Iterable[VerificationKey], key_id: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
    """Choose the keys for `algorithm` and, among those that have an id, the ones with `key_id` if there is one."""
    fit = (key for key in keys if key.algorithm == algorithm and (None in (key_id, key.id) or key.id == key_id))
    return tuple(fit)[:_MOST_TRIED]


def shared_key(secret: str) -> VerificationKey:
    """Make a key of a shared secret. Raises ValueError when it is a public key in disguise (RFC 8725 §2.1)."""
    try:
        prepared = get_default_algorithms()["HS256"].prepare_key(secret)
    except jwt.InvalidKeyError as error:
        raise ValueError("must be a secret, not a key in PEM or JWK form") from error
    return VerificationKey("HS256", prepared)


def pem_keys(text: str, algorithms: frozenset[str]) -> tuple[VerificationKey, ...]:
    """Read every public key of a PEM text; each is for that of `algorithms` which fits it, of RS256 and PS256 RS256.

    Raises ValueError for anything else in it.
    """
    blocks = list(_PEM.finditer(text))
    if not blocks:
        raise ValueError("holds no PEM block")
    keys: list[VerificationKey] = []
    for block in blocks:
        if "PRIVATE" in block[1]:
            raise ValueError("holds a private key; give the public one, and rotate this one")
        if block[1] not in ("PUBLIC KEY", "RSA PUBLIC KEY"):
            raise ValueError(f"holds {block[1]}, not PUBLIC KEY")
        try:
            key = load_pem_public_key(block[0].encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ValueError("holds a block that is no public key") from error
        algorithm = _algorithm_of(key, algorithms)
        if algorithm is None:
            raise ValueError(f"holds a key that fits none of {', '.join(sorted(algorithms))}")
        keys.append(VerificationKey(algorithm, _public(key)))
    return tuple(keys)


def set_keys(document: object, algorithms: frozenset[str]) -> tuple[VerificationKey, ...]:
    """Read the usable keys of a JSON Web Key Set (RFC 7517 §5: others are passed over).

    A key is for its own `alg` if it has one and that is among `algorithms`; else as in a PEM text.

    Raises ValueError when it is no key set, or nothing in it is of use.
    """
    listed = document.get("keys") if isinstance(document, Mapping) else None
    if not isinstance(listed, list) or len(listed) > _MOST_KEYS:
        raise ValueError("not a key set")
    keys = tuple(key for entry in listed if (key := _set_key(entry, algorithms)) is not None)
    if not keys:
        raise ValueError("no usable key")
    return keys


def _set_key(entry: object, algorithms: frozenset[str]) -> VerificationKey | None:
    """Read one JSON Web Key; None unless it is public, strong, and meant for what we would do with it."""
    if not isinstance(entry, dict) or "d" in entry or entry.get("kty") == "oct":
        return None
    use, operations, algorithm, key_id = (entry.get(name) for name in ("use", "key_ops", "alg", "kid"))
    meant = use in (None, "sig") and (operations is None or (isinstance(operations, list) and "verify" in operations))
    if not meant or not isinstance(key_id, str | None) or not isinstance(algorithm, str | None):
        return None
    try:
        key = _imported(entry)
        used = _algorithm_of(key, algorithms if algorithm is None else algorithms & {algorithm})
    except ValueError:
        return None
    return VerificationKey(used, _public(key), key_id) if used is not None else None


def _imported(entry: dict[str, Any]) -> object:
    kinds = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}
    kind = entry.get("kty")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError("unknown kty")
    try:
        key: object = get_default_algorithms()[kinds[kind]].from_jwk(entry)
    except (
        jwt.PyJWTError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        UnsupportedAlgorithm,
    ) as error:
        raise ValueError("not a key") from error
    return key


def _algorithm_of(key: object, allowed: AbstractSet[str]) -> str | None:
    return next((name for name in _fitting(key) if name in allowed), None)


def _fitting(key: object) -> tuple[str, ...]:
    """Give the algorithms that fit a key, the usual one first. Raises ValueError for a weak or another kind of key."""
    if isinstance(key, RSAPublicKey):
        least, most = _RSA_BITS
        exponent = key.public_numbers().e
        if not least <= key.key_size <= most or exponent < _LEAST_EXPONENT:
            raise ValueError(f"holds an RSA key of {key.key_size} bits and exponent {exponent}; too weak or too large")
        return "RS256", "PS256"
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return ("ES256",)
    if isinstance(key, Ed25519PublicKey):
        return ("EdDSA",)
    raise ValueError("holds a key that is neither RSA, P-256 nor Ed25519")


def _public(key: object) -> PublicKey:
    assert isinstance(key, RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey)  # noqa: S101  _fitting saw it
    return key
