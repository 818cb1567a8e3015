"""Many credentials at once from one address: guesses are told what guesses in a row would be, users all get in.

Nothing is proven before everybody waits for it: the store, and the provider of keys, answer when the test says so.
"""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from proxy.audit import Audit
from proxy.authentication import Authentication, Authenticator
from proxy.claims import ClaimRules
from proxy.credentials import make_key, parse_key
from proxy.errors import Problem
from proxy.failures import Failures
from proxy.issuers import Issuer
from proxy.jwks import Document, RemoteKeys
from proxy.keycache import KeyCache
from proxy.keys import StaticKeyStore
from proxy.limitsettings import read_rates
from proxy.model import RECORD, CredentialKind, Headers, Lifecycle, Record
from proxy.publickeys import PUBLIC
from proxy.storedkeys import StoredKey
from proxy.tokens import TokenVerifier
from tests.support.asgi import Client
from tests.support.jose import claims, make_signer

ISSUER = "https://idp.test"
SIGNER = make_signer("EdDSA")
LIMIT = 5


class GatedStore(StaticKeyStore):
    """A key store that answers when its gate is opened."""

    def __init__(self, keys: Sequence[StoredKey], gate: asyncio.Event) -> None:
        super().__init__(keys)
        self._gate = gate

    async def find(self, key_ids: Collection[str]) -> Mapping[str, StoredKey]:
        await self._gate.wait()
        return await super().find(key_ids)


class ToldAudit(Audit):
    """Keeps the reasons that would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def note_refusal(self, kind: CredentialKind, record: Record, *, reason: str, key_id: str = "") -> None:
        self.reasons.append(reason)

    def note_unreadable(self, record: Record, *, reason: str) -> None:
        self.reasons.append(reason)


class Door:
    """The door before a deployment that knows `keys` and one provider, and allows so many failures a minute."""

    def __init__(self, *keys: str) -> None:
        self._gate = asyncio.Event()
        self.audit = ToldAudit()
        cache = KeyCache(GatedStore([_stored(key) for key in keys], self._gate), grace=300)
        issuer = Issuer(rules=ClaimRules(issuer=ISSUER, audience="agentflow-proxy"), algorithms=PUBLIC, url=ISSUER)
        tokens = TokenVerifier([(issuer, RemoteKeys(issuer, self._fetch))], time.time)
        self._asgi = Authentication(
            self._reached,
            authenticator=Authenticator(tokens=tokens, keys=cache),
            failures=Failures(read_rates(f"{LIMIT}/minute"), clock=lambda: 0.0),
            lifecycle=Lifecycle(),
            audit=self.audit,
        )

    async def _reached(self, scope: Any, receive: Any, send: Any) -> None:
        """Let whoever comes so far in."""

    async def _fetch(self, _: str) -> Document:
        await self._gate.wait()
        return Document({"keys": [SIGNER.jwk()]}, None)

    async def _status(self, headers: Headers) -> int:
        record = Record(b"id", 0.0, "192.0.2.1")
        scope = {"type": "http", "path": "/a", "raw_path": b"/a", "headers": headers, RECORD: record}
        client = Client()
        try:
            await self._asgi(scope, client.receive, client.send)
        except Problem as problem:
            return problem.status
        return 200

    async def statuses(self, presented: Sequence[Headers]) -> list[int]:
        """Present all of these at once; only when each waits for its proof is any proven."""
        self._gate.clear()
        asking = [asyncio.create_task(self._status(headers)) for headers in presented]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in asking)
        self._gate.set()
        return await asyncio.gather(*asking)

    async def status(self, headers: Headers) -> int:
        """Present one credential."""
        self._gate.set()
        return await self._status(headers)


def _stored(key: str) -> StoredKey:
    parts = parse_key(key)
    assert parts is not None
    return StoredKey(parts.id, f"user-{parts.id}", parts.digest, frozenset())


def new_key() -> str:
    """Make a key that nobody has been given."""
    return make_key(secrets.choice)


def by_key(key: str) -> Headers:
    """Present a key."""
    return [(b"x-api-key", key.encode())]


def by_token(subject: str, signer: Any = SIGNER) -> Headers:
    """Present a token."""
    return [(b"authorization", f"Bearer {signer.sign(claims(ISSUER, subject=subject))}".encode())]


@pytest.mark.parametrize("kind", ["key", "token"])
async def test_guesses_at_once_are_told_as_much_as_guesses_in_a_row(kind: str) -> None:
    """Three hundred guesses, the right one last: five are refused and audited, the others unread."""
    right, forger = new_key(), dataclasses.replace(make_signer("EdDSA"), id=SIGNER.id)
    door = Door(right)
    guesses = [by_key(new_key()) if kind == "key" else by_token(f"u{n}", forger) for n in range(299)]

    statuses = await door.statuses([*guesses, by_key(right) if kind == "key" else by_token("alice")])

    assert statuses == [401] * LIMIT + [429] * (300 - LIMIT)
    assert len(door.audit.reasons) == LIMIT
    assert await door.status(by_key(new_key())) == 429


@pytest.mark.parametrize("kind", ["key", "token"])
async def test_hundreds_of_users_are_proven_at_once(kind: str) -> None:
    """After a restart a service presents its users' credentials from one address: to be proven is no failure."""
    users = [new_key() for _ in range(300)]
    door = Door(*users)

    statuses = await door.statuses([by_key(user) if kind == "key" else by_token(user) for user in users])

    assert statuses == [200] * 300
    assert door.audit.reasons == []


async def test_who_was_proven_before_the_guesses_is_let_in_among_them() -> None:
    """Guessing at once costs the address's known callers nothing."""
    known = new_key()
    door = Door(known)
    assert await door.status(by_key(known)) == 200
    await door.statuses([by_key(new_key()) for _ in range(50)])

    assert await door.status(by_key(known)) == 200


async def test_what_cannot_be_read_is_audited_until_the_failures_are_spent() -> None:
    """A flood of what is no credential fills no log."""
    door = Door()

    statuses = [await door.status([(b"authorization", b"Basic x")]) for _ in range(20)]

    assert statuses == [400] * LIMIT + [429] * 15
    assert door.audit.reasons == ["The Authorization scheme must be Bearer."] * LIMIT
