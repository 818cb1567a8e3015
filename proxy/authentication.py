"""The door: every request but those to public paths needs a proven credential before anything else runs.

Pure ASGI. Refuses by default, before routing and before a byte of the body is read (docs/adr/0001).
"""

from typing import Final

from proxy.credentials import ApiKey, Credential, digests_match, parse_key, read_credential
from proxy.errors import CredentialInvalid, CredentialMissing, Draining, MalformedCredential
from proxy.limits import RateLimit, address_partition
from proxy.model import (
    RECORD,
    App,
    CredentialKind,
    KeyStore,
    Lifecycle,
    Principal,
    Receive,
    Record,
    Scope,
    Send,
)
from proxy.tokens import TokenVerifier

PUBLIC: Final = frozenset({"/health/live", "/health/ready", "/docs", "/openapi.json"})
"""The only paths that need no credential; exact, as written."""


class Authenticator:
    """Turns a credential into a principal, by whichever of the two ways are configured."""

    def __init__(self, *, tokens: TokenVerifier | None, keys: KeyStore) -> None:
        self._tokens = tokens
        self._keys = keys

    def recall(self, credential: Credential) -> Principal | None:
        """Give the principal of a credential that was proven before, at no cost worth limiting."""
        if isinstance(credential, ApiKey) or self._tokens is None:
            return None
        return self._tokens.recall(credential.text)

    def prove(self, credential: Credential) -> Principal:
        """Prove a credential. Raises CredentialInvalid; the reason is for the log only."""
        if isinstance(credential, ApiKey):
            return self._prove_key(credential.text)
        if self._tokens is None:
            raise CredentialInvalid(reason="tokens are not configured")
        return self._tokens.verify(credential.text)

    def _prove_key(self, text: str) -> Principal:
        parts = parse_key(text)
        if parts is None:
            raise CredentialInvalid(reason="not a key's form")
        key = self._keys.find(parts.id)
        # An unknown id costs the same comparison as a wrong secret.
        if not digests_match(parts.digest, key.digest if key is not None else "0" * 64) or key is None:
            raise CredentialInvalid(reason="unknown key")
        return Principal(
            subject=key.name,
            name=key.name,
            namespace=f"key:{key.id}",
            scopes=key.scopes,
            kind=CredentialKind.API_KEY,
        )


class Authentication:
    """ASGI middleware that puts the principal into the request's Record, or raises the refusal."""

    def __init__(self, app: App, *, authenticator: Authenticator, failures: RateLimit, lifecycle: Lifecycle) -> None:
        self._app = app
        self._authenticator = authenticator
        self._failures = failures
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PUBLIC or scope["raw_path"] != scope["path"].encode():
            record: Record = scope[RECORD]
            record.principal = self._principal(scope["headers"], record.address)
            if self._lifecycle.draining:
                raise Draining
        await self._app(scope, receive, send)

    def _principal(self, headers: list[tuple[bytes, bytes]], address: str) -> Principal:
        """Find and prove the credential; a failed one counts against its address, one proven before does not."""
        try:
            credential = read_credential(headers)
        except MalformedCredential:
            self._count_failure(address)
            raise
        if credential is None:
            raise CredentialMissing
        if (known := self._authenticator.recall(credential)) is not None:
            return known
        partition = address_partition(address)
        self._failures.require_room(partition)
        try:
            return self._authenticator.prove(credential)
        except CredentialInvalid:
            self._failures.spend(partition)
            raise

    def _count_failure(self, address: str) -> None:
        self._failures.spend(address_partition(address))
