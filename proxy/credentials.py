"""Reading what a caller presents, and the form of an API key: prefix, id, secret, checksum.

Pure: proves nothing, looks nothing up, and never keeps a credential.
"""

import hashlib
import hmac
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from proxy.errors import MalformedCredential

MAX_CREDENTIAL_BYTES: Final = 8192
KEY_PREFIX: Final = "afp"
BEARER_SUBPROTOCOL: Final = b"agentflow-bearer"
_OFFERED: Final = 2
_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VISIBLE: Final = bytes(range(ord("!"), ord("~") + 1))
_ID_LENGTH: Final = 12
_SECRET_LENGTH: Final = 27  # 62^27 > 2^160
_CHECKSUM_LENGTH: Final = 6  # 62^6 > 2^32


@dataclass(frozen=True, slots=True, repr=False)
class BearerToken:
    """A presented JWT, unproven."""

    text: str


@dataclass(frozen=True, slots=True, repr=False)
class ApiKey:
    """A presented API key, unproven; `text` is not yet known to have a key's form."""

    text: str


type Credential = BearerToken | ApiKey


@dataclass(frozen=True, slots=True)
class KeyParts:
    """A well-formed key, taken apart: the id to look up and the digest to compare."""

    id: str
    digest: str


def with_offered_bearer(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Give a WebSocket's `headers` with the token that it offers as a subprotocol, if it does, as Authorization.

    A browser can set no header on a WebSocket; AgentFlow's clients offer `agentflow-bearer` and the token.
    Raises MalformedCredential for more than these two.
    """
    values = [value for name, value in headers if name == b"sec-websocket-protocol"]
    offered = [each.strip() for value in values for each in value.split(b",")]
    if len(offered) < _OFFERED or offered[0] != BEARER_SUBPROTOCOL:
        return headers
    if len(offered) > _OFFERED:
        raise MalformedCredential("Offer agentflow-bearer and one token.")
    return [*headers, (b"authorization", b"Bearer " + offered[1])]


def read_credential(headers: Iterable[tuple[bytes, bytes]]) -> Credential | None:
    """Find the one credential among raw `headers`; None when there is none.

    Raises MalformedCredential for two credentials, another scheme than Bearer, an empty, oversized or
    unprintable value (RFC 6750 §2, RFC 9110 §11.6.2).
    """
    found: Credential | None = None
    for name, value in headers:
        if name == b"authorization":
            credential: Credential = BearerToken(_bearer(value))
        elif name == b"x-api-key":
            credential = ApiKey(_printable(value))
        else:
            continue
        if found is not None:
            raise MalformedCredential("Present exactly one credential, once.")
        found = credential
    return found


def _bearer(value: bytes) -> str:
    scheme, _, token = value.partition(b" ")
    if scheme.lower() != b"bearer":
        raise MalformedCredential("The Authorization scheme must be Bearer.")
    return _printable(token)


def _printable(value: bytes) -> str:
    if not value or len(value) > MAX_CREDENTIAL_BYTES:
        raise MalformedCredential(f"A credential has 1 to {MAX_CREDENTIAL_BYTES} bytes.")
    if value.translate(None, _VISIBLE):  # a fifth of what a regular expression takes for a long token
        raise MalformedCredential("A credential has visible ASCII characters only.")
    return value.decode("ascii")


def make_key(choose: Callable[[str], str]) -> str:
    """Make a new key; `choose` picks one character of an alphabet at random (`secrets.choice`)."""
    key_id = "".join(choose(_ALPHABET) for _ in range(_ID_LENGTH))
    secret = "".join(choose(_ALPHABET) for _ in range(_SECRET_LENGTH))
    stem = f"{KEY_PREFIX}_{key_id}_{secret}"
    return stem + _checksum(stem)


def parse_key(text: str) -> KeyParts | None:
    """Take a key apart; None when its form or checksum is wrong, so that a typo costs no look-up."""
    prefix, _, rest = text.partition("_")
    key_id, _, tail = rest.partition("_")
    well_formed = (
        prefix == KEY_PREFIX
        and len(key_id) == _ID_LENGTH
        and len(tail) == _SECRET_LENGTH + _CHECKSUM_LENGTH
        and text.isascii()
        and (key_id + tail).isalnum()
    )
    if not well_formed or _checksum(text[:-_CHECKSUM_LENGTH]) != text[-_CHECKSUM_LENGTH:]:
        return None
    return KeyParts(key_id, digest_of(text))


def digest_of(text: str) -> str:
    """SHA-256 in hex. A key has 160 random bits, so a slow hash would add nothing."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def digests_match(presented: str, stored: str) -> bool:
    """Compare two digests in constant time."""
    return hmac.compare_digest(presented, stored)


def _checksum(stem: str) -> str:
    number = zlib.crc32(stem.encode("ascii"))
    digits = ""
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
