"""Tokens and subjects that count no more, as an operator lists them in a file, one JSON object a line.

Looks at the file every two seconds at most, when asked; never forgets what it knew because a file went bad.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxy.errors import CredentialInvalid
from proxy.jose import decode_strictly

log: Final = logging.getLogger("agentflow_proxy.tokens")
POLL_SECONDS: Final = 2.0
_MOST_BYTES: Final = 4 << 20
_TEXT: Final = r'"([^"\\\x00-\x1f\x7f-\U0010ffff]{1,255})"'
_PLAIN: Final = re.compile(rf'\{{"(jti|subject)": ?{_TEXT}(?:, ?"issuer": ?{_TEXT})?\}}')
"""The usual line, which can mean nothing else. A full file is read on the event loop, so in a fourth of the time."""

type Name = Annotated[str, Field(min_length=1, max_length=255)]


class Revocation(BaseModel):
    """One line: a token by `jti`, or a subject's tokens, all or those issued before `before` (Unix seconds).

    Without `issuer` it is meant of every issuer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    jti: Name | None = None
    subject: Name | None = None
    issuer: Name | None = None
    before: float | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.jti is None) == (self.subject is None):
            raise ValueError("must name a jti or a subject")
        if self.jti is not None and self.before is not None:
            raise ValueError("before goes with a subject")
        return self


class Revocations(Protocol):
    """Where revocations are looked up: a file here, a store that replicas share elsewhere."""

    def version(self) -> int:
        """Give a number that changes whenever what is revoked may have changed; never waits."""

    def covers(self, *, issuer: str, subject: str, token_id: str | None, issued: float | None) -> bool:
        """Say whether a token with these claims was revoked; never waits."""


@dataclass(frozen=True, slots=True)
class RevocationList:
    """Revocations that stay as they are; none, as it stands."""

    tokens: frozenset[tuple[str | None, str]] = frozenset()
    subjects: Mapping[tuple[str | None, str], float] = field(default_factory=dict)

    def version(self) -> int:
        return 0

    def covers(self, *, issuer: str, subject: str, token_id: str | None, issued: float | None) -> bool:
        # A token that does not say when it was issued counts as old.
        if token_id is not None and not self.tokens.isdisjoint({(None, token_id), (issuer, token_id)}):
            return True
        before = max(self.subjects.get((who, subject), float("-inf")) for who in (None, issuer))
        return before > (float("-inf") if issued is None else issued)


def parse_revocations(text: str) -> RevocationList:
    """Read one JSON object a line; blank lines and those that begin with # say nothing. Raises ValueError.

    A line has one meaning, or is a fault: of a name that came twice one would be let in, and no time is before NaN.
    """
    tokens: set[tuple[str | None, str]] = set()
    subjects: dict[tuple[str | None, str], float] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if (plain := _PLAIN.fullmatch(line)) is not None:
            kind, name, issuer = plain.groups()
            if kind == "jti":
                tokens.add((issuer, name))
            else:
                subjects[issuer, name] = float("inf")
            continue
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entry = Revocation.model_validate(decode_strictly(line.encode()))
        except CredentialInvalid as error:
            raise ValueError(f"line {number}: {error.reason}") from error
        except ValidationError as error:
            raise ValueError(f"line {number}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        if entry.jti is not None:
            tokens.add((entry.issuer, entry.jti))
        elif entry.subject is not None:
            who = (entry.issuer, entry.subject)
            before = float("inf") if entry.before is None else entry.before
            subjects[who] = max(before, subjects.get(who, before))
    return RevocationList(frozenset(tokens), subjects)


def read_revocations(path: Path) -> RevocationList:
    """Read a file of revocations. Raises ValueError that says what is wrong with it."""
    try:
        return _read(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def _read(path: Path) -> RevocationList:
    with path.open("rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"has more than {_MOST_BYTES} bytes")
    return parse_revocations(raw.decode("utf-8"))


class RevocationFile:
    """A file's revocations, read again when it changed. Its last good content counts until it has a new one."""

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._seen = self._signature()  # before reading: what is written meanwhile is seen at the next look
        self._list = read_revocations(path)
        self._told = ""
        self._version = 0
        self._looked = clock()

    def version(self) -> int:
        if self._clock() - self._looked >= POLL_SECONDS:
            self._looked = self._clock()
            self._look()
        return self._version

    def covers(self, *, issuer: str, subject: str, token_id: str | None, issued: float | None) -> bool:
        return self._list.covers(issuer=issuer, subject=subject, token_id=token_id, issued=issued)

    def _look(self) -> None:
        seen = self._signature()
        if seen == self._seen:
            self._told = ""
            return
        try:
            self._list = _read(self._path)
        except OSError as error:  # that may pass without a change to the file, so it is tried again
            self._keep(f"cannot be read: {error.strerror}")
            return
        except ValueError as error:
            self._seen = seen
            self._keep(str(error))
            return
        self._seen, self._told = seen, ""
        self._version += 1
        log.info(
            "revocations.read",
            extra={"fields": {"tokens": len(self._list.tokens), "subjects": len(self._list.subjects)}},
        )

    def _keep(self, reason: str) -> None:
        if reason != self._told:
            log.warning("revocations.kept", extra={"fields": {"reason": reason}})
        self._told = reason

    def _signature(self) -> tuple[int, int, int, int] | None:
        """Tell two contents apart without reading them: an edit changes one of these."""
        try:
            status = os.stat(self._path)  # noqa: PTH116  follows the link that an orchestrator swaps
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
