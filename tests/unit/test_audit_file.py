"""The file of the audit log: whose it is, and what happens when it cannot be begun anew."""

import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import audit
from proxy.server import configure_audit


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Send the audit log to a file of its own directory."""
    path = tmp_path / "logs" / "audit.log"
    path.parent.mkdir()
    handlers, propagate, level = audit.log.handlers, audit.log.propagate, audit.log.level
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as the server has it
    configure_audit(path)
    yield path
    for handler in audit.log.handlers:
        handler.close()
    audit.log.handlers, audit.log.propagate = handlers, propagate
    audit.log.setLevel(level)


def test_every_file_is_its_owner_s_alone(file: Path) -> None:
    """The first one, and the one that is begun when it was moved away: whoever shares the machine reads neither."""
    audit.write("key.created", by="olga")
    moved = file.rename(file.with_suffix(".1"))
    audit.write("key.revoked", by="olga")

    assert [stat.S_IMODE(path.stat().st_mode) for path in (moved, file)] == [0o600, 0o600]
    assert "key.revoked" in file.read_text()


def test_a_file_that_cannot_be_begun_stops_nothing(file: Path) -> None:
    """With its directory gone nobody is refused for want of a line; and lines are written when it is back."""
    moved = file.parent.rename(file.parent.with_name("gone"))
    audit.write("key.refused", reason="key unknown")
    moved.rename(file.parent)
    audit.write("key.refused", reason="key revoked")

    assert "key revoked" in file.read_text()
