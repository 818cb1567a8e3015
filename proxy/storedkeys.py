"""API keys as they are kept, and the Protocol of what keeps them. Pure; a key itself is never here."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A stored API key: never the key itself, only its digest (SHA-256, hex). Times are Unix seconds.

    `caller` is the id of the first key of a line of rotations, which all own the same threads; empty: this one's.
    `replaced_by` and `grace_ends` come with a rotation; `changed` grows with every change to any key of a store.
    """

    id: str
    name: str
    digest: str
    scopes: frozenset[str]
    tier: str = "default"
    rate: str | None = None
    caller: str = ""
    created: int = 0
    expires: int | None = None
    last_used: int | None = None
    created_by: str = ""
    replaced_by: str | None = None
    grace_ends: int | None = None
    revoked: int | None = None
    changed: int = 0

    def refusal_at(self, now: float) -> str:
        """Say why the key does not work at `now` (Unix seconds); empty when it does."""
        if self.revoked is not None:
            return "key revoked"
        if self.expires is not None and now >= self.expires:
            return "key expired"
        if self.grace_ends is not None and now >= self.grace_ends:
            return "key replaced"
        return ""


class KeyStore(Protocol):
    """Where API keys are kept. Every method raises KeyStoreDown when the store does not answer in time."""

    async def find(self, key_ids: Collection[str]) -> Mapping[str, StoredKey]:
        """Give the stored keys that have these ids, whether they still work or not."""

    async def change_number(self) -> int:
        """Give the number of the last change to any key; it only grows."""

    async def changed_since(self, number: int) -> Sequence[StoredKey]:
        """Give every key that changed after `number`, as it is now."""

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        """Write when keys were last used (Unix seconds by id); an earlier time than the stored one changes nothing."""


class KeyRefusedError(Exception):
    """A command asked for what cannot be; its text is a sentence for people."""
