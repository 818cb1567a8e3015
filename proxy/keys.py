"""API keys kept as digests in a TOML text: `[[keys]]` with name, digest, scopes; also tier, rate, expires.

Reads what an operator wrote; never sees or makes a key itself.
"""

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, StringConstraints, ValidationError, field_validator

from proxy.credentials import KEY_PREFIX
from proxy.operations import SCOPES
from proxy.policies import RATE
from proxy.storedkeys import StoredKey

DIGEST_FORM: Final = re.compile(r"sha256:([0-9A-Za-z]{12}):([0-9a-f]{64})", re.ASCII)
_KEY: Final = re.compile(rf"{KEY_PREFIX}_[0-9A-Za-z_]+", re.ASCII)
_WORD: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class KeyEntry(BaseModel):
    """One `[[keys]]` table. `digest` is `sha256:<key id>:<hex>`, as `agentflow-proxy keys new` prints it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=_WORD)]
    digest: str
    scopes: frozenset[str]
    tier: Annotated[str, StringConstraints(pattern=_WORD)] = "default"
    rate: Annotated[str, StringConstraints(pattern=RATE.pattern)] | None = None
    expires: AwareDatetime | None = None

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


def parse_keys(text: str) -> tuple[StoredKey, ...]:
    """Read the keys of a TOML text. Raises ValueError that names every fault in it at once."""
    try:
        entries = KeyFile.model_validate(tomllib.loads(text)).keys
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"not TOML: {error}") from error
    except ValidationError as error:
        raise ValueError(_faults(error)) from error
    return _different([_key_of(entry) for entry in entries])


def parse_import(text: str) -> tuple[StoredKey, ...]:
    """Read keys in either form; the first line that is neither blank nor a remark tells which. Raises ValueError."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return parse_digest_lines(text) if first.startswith("sha256:") else parse_keys(text)


def parse_digest_lines(text: str) -> tuple[StoredKey, ...]:
    """Read keys from lines of `sha256:<id>:<hex> <name> <scope>,<scope>`. Raises ValueError at the first fault."""
    keys: list[StoredKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 3:  # noqa: PLR2004  digest, name, scopes
            raise ValueError(f"line {number}: must be a digest, a name, and scopes separated by commas")
        try:
            keys.append(read_entry(digest=words[0], name=words[1], scopes=frozenset(words[2].split(","))))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return _different(keys)


def read_entry(**fields: object) -> StoredKey:
    """Read one key from the fields of a `[[keys]]` table. Raises ValueError that names every fault."""
    try:
        return _key_of(KeyEntry.model_validate(fields))
    except ValidationError as error:
        raise ValueError(_faults(error)) from error


def _different(keys: Sequence[StoredKey]) -> tuple[StoredKey, ...]:
    """Give the keys, of which no later one may speak for an earlier. Raises ValueError."""
    for label, values in (("names", [key.name for key in keys]), ("ids", [key.id for key in keys])):
        if len(values) != len(set(values)):
            raise ValueError(f"two keys share their {label}")
    return tuple(keys)


def _faults(error: ValidationError) -> str:
    """Say what is wrong, and never a key itself, which somebody may have written where its digest belongs."""
    faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return _KEY.sub(f"{KEY_PREFIX}_…", "; ".join(faults))


def _key_of(entry: KeyEntry) -> StoredKey:
    _, key_id, digest = entry.digest.split(":")
    expires = int(entry.expires.timestamp()) if entry.expires is not None else None
    return StoredKey(key_id, entry.name, digest, entry.scopes, tier=entry.tier, rate=entry.rate, expires=expires)


def entry_text(*, name: str, key_id: str, digest: str, scopes: Iterable[str]) -> str:
    """Write one `[[keys]]` table, as `parse_keys` reads it."""
    listed = ", ".join(f'"{scope}"' for scope in sorted(scopes))
    return f'[[keys]]\nname = "{name}"\ndigest = "sha256:{key_id}:{digest}"\nscopes = [{listed}]\n'


class StaticKeyStore:
    """Keys held in memory from start to end; they never change."""

    def __init__(self, keys: Iterable[StoredKey]) -> None:
        self._keys = {key.id: key for key in keys}

    async def find(self, key_ids: Collection[str]) -> Mapping[str, StoredKey]:
        return {key_id: self._keys[key_id] for key_id in key_ids if key_id in self._keys}

    async def change_number(self) -> int:
        return 0

    async def changed_since(self, number: int) -> Sequence[StoredKey]:  # noqa: ARG002  nothing ever did
        return ()

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        """Keep nothing: the keys are another's to write."""
