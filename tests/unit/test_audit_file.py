"""The file of the audit log: whose it is, and what happens when it cannot be begun anew."""

import logging
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import audit
from proxy.auditfile import configure_audit
from proxy.logs import BackgroundHandler, lines_dropped


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


class _Stuck(logging.Handler):
    """A file on a disk that answers only when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.reached = threading.Event()
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reached.set()
        assert self.let_go.wait(30)
        self.written.append(record.getMessage())


def test_a_disk_that_hangs_stops_nobody(file: Path) -> None:
    """Whoever writes goes on at once; what there is no room for is counted, the rest is written in the end."""
    stuck = _Stuck()
    assert file.exists()
    for handler in audit.log.handlers:
        handler.close()
    audit.log.handlers = [background] = [BackgroundHandler(stuck, most=3)]
    before = lines_dropped()

    audit.write("first")
    assert stuck.reached.wait(30)
    for number in range(5):
        audit.write(f"event-{number}")
    lost = lines_dropped() - before
    stuck.let_go.set()
    background.flush()

    assert lost == 2
    assert stuck.written == ["first", "event-0", "event-1", "event-2"]
