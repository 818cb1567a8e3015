"""Callers for tests: the secret they sign with, their tokens and keys, and the settings that let them in.

It makes credentials as an identity provider and an operator would, not as the proxy does.
"""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import jwt

from proxy.credentials import make_key, parse_key
from proxy.keys import entry_text
from proxy.operations import SCOPES


@dataclass(slots=True)
class Principals:
    """Everybody who may call one proxy."""

    jwt_secret: str = field(default_factory=lambda: secrets.token_urlsafe(48))
    issuer: str = "https://idp.test"
    audience: str = "agentflow-proxy"
    entries: list[str] = field(default_factory=list)

    def token(self, subject: str, scopes: Iterable[str] = SCOPES, **claims: object) -> str:
        """Sign a token that lives ten minutes; `claims` are added or replaced, None takes one away."""
        now = int(time.time())
        usual = {"sub": subject, "iss": self.issuer, "aud": self.audience, "iat": now, "exp": now + 600}
        meant = usual | {"scope": " ".join(scopes)} | claims
        return jwt.encode({name: value for name, value in meant.items() if value is not None}, self.jwt_secret, "HS256")

    def key(self, name: str, scopes: Iterable[str] = SCOPES) -> str:
        """Make a key that a proxy started from here on knows."""
        key = make_key(secrets.choice)
        parts = parse_key(key)
        assert parts is not None
        self.entries.append(entry_text(name=name, key_id=parts.id, digest=parts.digest, scopes=scopes))
        return key

    def environment(self) -> dict[str, str]:
        """Give the proxy's settings that let these callers in, and nobody else."""
        return {
            "PROXY_JWT_SECRET": self.jwt_secret,
            "PROXY_JWT_ISSUER": self.issuer,
            "PROXY_JWT_AUDIENCE": self.audience,
            "PROXY_API_KEYS": "\n".join(self.entries),
        }
