"""A token's outer form: three parts, canonical base64url, two JSON objects, a header without tricks.

Pure: says what a token claims to be, and never whether that is true.
"""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NoReturn

from proxy.errors import CredentialInvalid

MAX_TOKEN_BYTES: Final = 8192
_PARTS: Final = 3
_PART: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_REFUSED: Final = ("crit", "b64", "zip", "enc", "cty", "jku", "jwk", "x5u", "x5c")
"""Parameters that change how a token is read, or bring its key: neither is the caller's to say (RFC 8725 §3.10)."""
_MAX_TEXT: Final = 255


@dataclass(frozen=True, slots=True)
class UnprovenToken:
    """A well-formed token, of which nothing is proven. `signed` are the bytes under `signature` (RFC 7515 §5.1)."""

    algorithm: str
    key_id: str | None
    type: str
    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes


def read_token(text: str) -> UnprovenToken:
    """Take a compact JWS with claims apart (RFC 7515 §7.1, RFC 7519 §7.2).

    Raises CredentialInvalid for every form that two readers could take for two different tokens.
    """
    if len(text) > MAX_TOKEN_BYTES:
        _refuse("oversized")
    parts = text.split(".")
    if len(parts) != _PARTS:
        _refuse(f"{len(parts)} parts")
    header_bytes, payload, signature = (_decode(part) for part in parts)
    header = decode_strictly(header_bytes)
    for name in _REFUSED:
        if name in header:
            _refuse(f"header has {name}")
    return UnprovenToken(
        algorithm=_text(header, "alg") or "",
        key_id=_text(header, "kid"),
        type=(_text(header, "typ") or "").lower().removeprefix("application/"),
        claims=decode_strictly(payload),
        signed=f"{parts[0]}.{parts[1]}".encode("ascii"),
        signature=signature,
    )


def decode_strictly(raw: bytes) -> dict[str, Any]:
    """Read a JSON object that has one meaning: UTF-8, no name twice, finite numbers, no lone surrogates.

    RFC 7519 §4 lets a reader take the last of two claims; then the one who checks and the one who uses a
    token may see two. Raises CredentialInvalid.
    """
    try:
        value = _decoder().decode(raw.decode("utf-8"))
        if b"\\u" in raw:  # the only way in which a lone surrogate could be written
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CredentialInvalid(reason="not one JSON text") from error
    if not isinstance(value, dict):
        _refuse("not a JSON object")
    return value


def _decode(part: str) -> bytes:
    """Decode base64url without padding; only the one canonical spelling of the bytes is accepted (RFC 4648 §3.5)."""
    if not _PART.fullmatch(part) or len(part) % 4 == 1:
        _refuse("not base64url")
    decoded = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != part.encode("ascii"):
        _refuse("not canonical base64url")
    return decoded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name comes twice")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


@cache
def _decoder() -> json.JSONDecoder:
    """Make the one decoder: `json.loads` would make one for each text, which takes as long as to read it."""
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)


def _text(header: Mapping[str, Any], name: str) -> str | None:
    if name not in header:
        return None
    value = header[name]
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        _refuse(f"{name} is not printable text")
    return value


def _refuse(reason: str) -> NoReturn:
    raise CredentialInvalid(reason=reason)
