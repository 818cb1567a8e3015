"""The door: every request but those to public paths needs a proven credential before anything else runs.

Pure ASGI. Refuses by default, before routing and before a byte of the body is read (docs/adr/0001).
"""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from proxy.audit import Audit
from proxy.credentials import (
    ApiKey,
    Credential,
    KeyParts,
    digests_match,
    parse_key,
    read_credential,
    with_offered_bearer,
)
from proxy.delegation import act_for_named
from proxy.errors import ClientProblem, CredentialInvalid, CredentialMissing, MalformedCredential
from proxy.failures import Failures
from proxy.keycache import KeyCache
from proxy.model import (
    RECORD,
    REPROVE,
    App,
    CredentialKind,
    Headers,
    Lifecycle,
    Principal,
    Receive,
    Record,
    Scope,
    Send,
)
from proxy.outages import Draining
from proxy.storedkeys import StoredKey
from proxy.tokens import TokenVerifier

PUBLIC: Final = frozenset({"/health/live", "/health/ready", "/docs", "/openapi.json"})
"""The only paths that need no credential; exact, as written."""


class Authenticator:
    """Turns a credential into a principal, by whichever of the two ways are configured."""

    def __init__(self, *, tokens: TokenVerifier | None, keys: KeyCache, clock: Callable[[], float] = time.time) -> None:
        self._tokens = tokens
        self._keys = keys
        self._clock = clock

    def recall(self, credential: Credential) -> Principal | None:
        """Give the principal where proof costs next to nothing: a known key, or a token proven before."""
        if isinstance(credential, ApiKey):
            parts = parse_key(credential.text)
            key = self._keys.recall(parts.id) if parts is not None else None
            if parts is None or key is None or self._fault_of(key, parts):
                return None
            return self._principal_of_key(key)
        return self._tokens.recall(credential.text) if self._tokens is not None else None

    async def prove(self, credential: Credential) -> Principal:
        """Prove what was not recalled. Raises CredentialInvalid, the reason for the log only, or a 503 Problem."""
        if isinstance(credential, ApiKey):
            parts = parse_key(credential.text)
            if parts is None:
                raise CredentialInvalid(reason="not a key's form")
            key = await self._keys.find(parts.id)
            fault = self._fault_of(key, parts)
            if key is None or fault:
                raise CredentialInvalid(reason=fault)
            return self._principal_of_key(key)
        if self._tokens is None:
            raise CredentialInvalid(reason="tokens are not configured")
        return await self._tokens.prove(credential.text)

    def _fault_of(self, key: StoredKey | None, parts: KeyParts) -> str:
        """Say why what was presented is not this key, or why the key does not work; empty when it proves its caller."""
        # An unknown id costs the same comparison as a wrong secret.
        is_secret = digests_match(parts.digest, key.digest if key is not None else "0" * 64)
        if key is None:
            return "key unknown"
        return key.refusal_at(self._clock()) if is_secret else "key secret wrong"

    def _principal_of_key(self, key: StoredKey) -> Principal:
        self._keys.note_use(key.id)
        return Principal(
            subject=key.name,
            name=key.name,
            namespace=f"key:{key.caller or key.id}",
            scopes=key.scopes,
            kind=CredentialKind.API_KEY,
            tier=key.tier,
            rate=key.rate,
            key_id=key.id,
        )


class Authentication:
    """ASGI middleware that puts the principal into the request's Record, or raises the refusal.

    A failed credential counts against its address. Once the address has spent its failures, what is not recalled
    is refused unproven: guessing then costs us little, and it costs the address's known callers nothing. The same
    answer gets what was still being proven when they were spent, whatever came of it. A proof that is under way is
    no failure: a service may present hundreds of users at once.
    """

    def __init__(
        self, app: App, *, authenticator: Authenticator, failures: Failures, lifecycle: Lifecycle, audit: Audit
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._failures = failures
        self._lifecycle = lifecycle
        self._audit = audit

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["path"] in PUBLIC and scope["raw_path"] == scope["path"].encode():
            return self._app(scope, receive, send)
        record: Record = scope[RECORD]
        if scope["type"] == "websocket":
            scope["headers"] = self._offered(scope["headers"], record)
            scope[REPROVE] = partial(self._reprove, scope["headers"], record)
        credential = self._read(scope["headers"], record)
        principal = self._authenticator.recall(credential)
        if principal is None:
            return self._admit_proven(credential, record, scope, receive, send)
        return self._admit(principal, record, scope, receive, send)

    async def _admit_proven(
        self, credential: Credential, record: Record, scope: Scope, receive: Receive, send: Send
    ) -> None:
        principal = await self._prove(credential, record)
        await self._admit(principal, record, scope, receive, send)

    def _admit(
        self, principal: Principal, record: Record, scope: Scope, receive: Receive, send: Send
    ) -> Awaitable[None]:
        if principal.key_id:
            self._audit.note_use(principal, record)
        record.principal = principal  # in the access line, whomever it acts for
        try:
            record.principal = act_for_named(principal, scope["headers"])
        except ClientProblem as problem:
            self._audit.note_delegation_refusal(principal, record, reason=problem.detail)
            raise
        if self._lifecycle.draining:
            raise Draining
        return self._app(scope, receive, send)

    async def _reprove(self, headers: Headers, record: Record) -> Principal:
        credential = self._read(headers, record)
        principal = self._authenticator.recall(credential) or await self._prove(credential, record)
        try:
            return act_for_named(principal, headers)
        except ClientProblem as problem:
            self._audit.note_delegation_refusal(principal, record, reason=problem.detail)
            raise

    def _offered(self, headers: Headers, record: Record) -> Headers:
        try:
            return with_offered_bearer(headers)
        except MalformedCredential as problem:
            self._fail_unread(record, problem.detail)
            raise

    def _read(self, headers: Headers, record: Record) -> Credential:
        try:
            credential = read_credential(headers)
        except MalformedCredential as problem:
            self._fail_unread(record, problem.detail)
            raise
        if credential is None:
            raise CredentialMissing
        return credential

    def _fail_unread(self, record: Record, reason: str) -> None:
        self._failures.spend(record.address)
        self._audit.note_unreadable(record, reason=reason)

    async def _prove(self, credential: Credential, record: Record) -> Principal:
        self._failures.require_room(record.address)
        try:
            principal = await self._authenticator.prove(credential)
        except CredentialInvalid as problem:
            self._failures.spend(record.address)
            kind = CredentialKind.API_KEY if isinstance(credential, ApiKey) else CredentialKind.JWT
            self._audit.note_refusal(kind, record, reason=problem.reason, key_id=_key_id(credential))
            raise
        self._failures.require_room(record.address)  # others may have failed meanwhile
        return principal


def _key_id(credential: Credential) -> str:
    """Give the id that a key of the right form names; it is no secret."""
    parts = parse_key(credential.text) if isinstance(credential, ApiKey) else None
    return parts.id if parts is not None else ""
