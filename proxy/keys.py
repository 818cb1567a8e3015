"""API keys kept as digests in a TOML text: `[[keys]]` with name, digest, scopes.

Reads what an operator wrote; never sees or makes a key itself.
"""

import re
import tomllib
from collections.abc import Iterable
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, field_validator

from proxy.model import StaticKey
from proxy.operations import SCOPES

DIGEST_FORM: Final = re.compile(r"sha256:([0-9A-Za-z]{12}):([0-9a-f]{64})", re.ASCII)


class KeyEntry(BaseModel):
    """One `[[keys]]` table. `digest` is `sha256:<key id>:<hex>`, as `agentflow-proxy keys new` prints it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    digest: str
    scopes: frozenset[str]

    @field_validator("digest")
    @classmethod
    def _has_form(cls, value: str) -> str:
        if DIGEST_FORM.fullmatch(value) is None:
            raise ValueError("must be sha256:<key id>:<64 hex digits>")
        return value

    @field_validator("scopes")
    @classmethod
    def _are_known(cls, value: frozenset[str]) -> frozenset[str]:
        if unknown := sorted(value - SCOPES):
            raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(SCOPES))}")
        return value


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[KeyEntry]


def parse_keys(text: str) -> tuple[StaticKey, ...]:
    """Read the keys of a TOML text. Raises ValueError that names every fault in it at once."""
    try:
        entries = KeyFile.model_validate(tomllib.loads(text)).keys
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"not TOML: {error}") from error
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError("; ".join(faults)) from error
    keys = tuple(_key_of(entry) for entry in entries)
    for label, values in (("names", [key.name for key in keys]), ("ids", [key.id for key in keys])):
        if len(values) != len(set(values)):
            raise ValueError(f"two keys share their {label}")
    return keys


def _key_of(entry: KeyEntry) -> StaticKey:
    _, key_id, digest = entry.digest.split(":")
    return StaticKey(id=key_id, name=entry.name, digest=digest, scopes=entry.scopes)


def entry_text(*, name: str, key_id: str, digest: str, scopes: Iterable[str]) -> str:
    """Write one `[[keys]]` table, as `parse_keys` reads it."""
    listed = ", ".join(f'"{scope}"' for scope in sorted(scopes))
    return f'[[keys]]\nname = "{name}"\ndigest = "sha256:{key_id}:{digest}"\nscopes = [{listed}]\n'


class StaticKeyStore:
    """Keys held in memory from start to end."""

    def __init__(self, keys: Iterable[StaticKey]) -> None:
        self._keys = {key.id: key for key in keys}

    def find(self, key_id: str) -> StaticKey | None:
        """Give the key with this id."""
        return self._keys.get(key_id)
