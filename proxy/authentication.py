"""The door: every request but those to public paths needs a proven credential before anything else runs.

Pure ASGI. Refuses by default, before routing and before a byte of the body is read (docs/adr/0001).
"""

from typing import Final

from proxy.credentials import ApiKey, Credential, digests_match, parse_key, read_credential
from proxy.delegation import act_for_named
from proxy.errors import CredentialInvalid, CredentialMissing, Draining, MalformedCredential
from proxy.limits import RateLimit, address_partition
from proxy.model import (
    RECORD,
    App,
    CredentialKind,
    Headers,
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
        """Give the principal where proof costs next to nothing: a stored key, or a token proven before."""
        if isinstance(credential, ApiKey):
            return self._principal_of_key(credential.text)
        return self._tokens.recall(credential.text) if self._tokens is not None else None

    async def prove(self, credential: Credential) -> Principal:
        """Prove what was not recalled. Raises CredentialInvalid, the reason for the log only, or a 503 Problem."""
        if isinstance(credential, ApiKey):
            raise CredentialInvalid(reason="unknown key" if parse_key(credential.text) else "not a key's form")
        if self._tokens is None:
            raise CredentialInvalid(reason="tokens are not configured")
        return await self._tokens.prove(credential.text)

    def _principal_of_key(self, text: str) -> Principal | None:
        parts = parse_key(text)
        if parts is None:
            return None
        key = self._keys.find(parts.id)
        # An unknown id costs the same comparison as a wrong secret.
        if not digests_match(parts.digest, key.digest if key is not None else "0" * 64) or key is None:
            return None
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
            proven = await self._principal(scope["headers"], record.address)
            record.principal = proven  # in the access line, whomever it acts for
            record.principal = act_for_named(proven, scope["headers"])
            if self._lifecycle.draining:
                raise Draining
        await self._app(scope, receive, send)

    async def _principal(self, headers: Headers, address: str) -> Principal:
        """Find and prove the credential; a failed one counts against its address.

        Once the address has spent its failures, what is not recalled is refused unproven: guessing then costs
        us little, and it costs the address's known callers nothing.
        """
        try:
            credential = read_credential(headers)
            if credential is None:
                raise CredentialMissing
            known = self._authenticator.recall(credential)
            return known if known is not None else await self._prove(credential, address)
        except (MalformedCredential, CredentialInvalid):
            self._failures.spend(address_partition(address))
            raise

    async def _prove(self, credential: Credential, address: str) -> Principal:
        self._failures.require_room(address_partition(address))
        return await self._authenticator.prove(credential)
