"""Makes tokens, keys and key sets as a provider would, and as a forger would, byte by byte.

It imports nothing of the proxy's own reading of tokens.
"""

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

type PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def b64(data: bytes) -> str:
    """Write base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    """Write a big-endian number in base64url (RFC 7518 §6)."""
    return b64(value.to_bytes((value.bit_length() + 7) // 8))


def compact(header: object, payload: object, signature: bytes = b"") -> str:
    """Write any header and payload as a token; bytes and text stay as they are."""
    return f"{_part(header)}.{_part(payload)}.{b64(signature)}"


def _part(value: object) -> str:
    if isinstance(value, str):
        return value
    return b64(value if isinstance(value, bytes) else json.dumps(value).encode())


def hmac_signed(header: object, payload: object, secret: bytes, digest: str = "sha256") -> str:
    """Sign with a shared secret, whatever the header says."""
    stem = compact(header, payload).rpartition(".")[0]
    return f"{stem}.{b64(hmac.digest(secret, stem.encode(), digest))}"


@dataclass(frozen=True, slots=True)
class Signer:
    """A provider's key and its id."""

    algorithm: str
    key: PrivateKey = field(repr=False)
    id: str = "k1"

    def sign(self, payload: object, **header: object) -> str:
        """Sign claims; a header of None is left out."""
        named = {"alg": self.algorithm, "kid": self.id, "typ": "JWT"} | header
        return self.sign_as({name: value for name, value in named.items() if value is not None}, payload)

    def sign_as(self, header: object, payload: object) -> str:
        """Sign under any header at all."""
        stem = compact(header, payload).rpartition(".")[0]
        return f"{stem}.{b64(self._signature(stem.encode()))}"

    def _signature(self, stem: bytes) -> bytes:
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return self.key.sign(stem)
        if isinstance(self.key, ec.EllipticCurvePrivateKey):
            r, s = utils.decode_dss_signature(self.key.sign(stem, ec.ECDSA(SHA256())))
            size = (self.key.curve.key_size + 7) // 8
            return r.to_bytes(size) + s.to_bytes(size)
        if self.algorithm == "PS256":
            return self.key.sign(stem, padding.PSS(padding.MGF1(SHA256()), hashlib.sha256().digest_size), SHA256())
        return self.key.sign(stem, padding.PKCS1v15(), SHA256())

    def pem(self, form: PublicFormat = PublicFormat.SubjectPublicKeyInfo) -> bytes:
        """Give the public key as an operator would have it."""
        return self.key.public_key().public_bytes(Encoding.PEM, form)

    def der(self) -> bytes:
        """Give the public key's bytes."""
        return self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def jwk(self, **more: object) -> dict[str, Any]:
        """Give the public key as a JSON Web Key; None takes a member away."""
        public = self.key.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            numbers = public.public_numbers()
            own: dict[str, object] = {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
        elif isinstance(public, ec.EllipticCurvePublicKey):
            point = public.public_numbers()
            own = {"kty": "EC", "crv": "P-256", "x": b64(point.x.to_bytes(32)), "y": b64(point.y.to_bytes(32))}
        else:
            own = {"kty": "OKP", "crv": "Ed25519", "x": b64(public.public_bytes_raw())}
        named = own | {"kid": self.id, "use": "sig", "alg": self.algorithm} | more
        return {name: value for name, value in named.items() if value is not None}


def make_signer(algorithm: str, key_id: str = "k1", bits: int = 2048) -> Signer:
    """Make a provider's key."""
    if algorithm == "ES256":
        return Signer(algorithm, ec.generate_private_key(ec.SECP256R1()), key_id)
    if algorithm == "EdDSA":
        return Signer(algorithm, ed25519.Ed25519PrivateKey.generate(), key_id)
    return Signer(algorithm, rsa.generate_private_key(65537, bits), key_id)


def claims(issuer: str, audience: str = "agentflow-proxy", subject: str = "alice", **more: object) -> dict[str, Any]:
    """Give claims that live ten minutes; None takes one away."""
    now = int(time.time())
    usual = {"iss": issuer, "aud": audience, "sub": subject, "iat": now, "exp": now + 600, "scope": "agent:ping"}
    return {name: value for name, value in (usual | more).items() if value is not None}
