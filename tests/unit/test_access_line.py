"""The access line as it is written: one JSON object, whatever a caller put into it."""

import io
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.accesslog import LONGEST_PATH, AccessLog
from proxy.logs import LineHandler, LineWriter, configure_logging, make_readable
from proxy.model import CredentialKind, Principal, Record


class Told:
    """Stands for the writer: keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.dropped = 0

    def write(self, line: bytes) -> None:
        self.lines.append(line)

    def flush(self, seconds: float) -> None:
        pass


@pytest.fixture
def told() -> Told:
    """Collect what is logged, for the length of a test."""
    return Told()


def _written(record: Record, now: float = 2.0) -> str:
    told = Told()
    root, level = logging.getLogger(), logging.getLogger().level
    before, root.handlers = root.handlers, [LineHandler(told)]  # type: ignore[arg-type]  # a fake
    root.setLevel("INFO")
    try:
        AccessLog(lambda: 1_700_000_000.25).end(record, now)
    finally:
        root.handlers = before
        root.setLevel(level)
    (line,) = told.lines
    return line.decode("ascii")


def _record(path: str = "/agent/invoke", name: str = "alice", **fields: object) -> Record:
    record = Record(b"id-1", 1.0, "192.0.2.1", "POST", path)
    record.principal = Principal(name, name, "n", frozenset(), CredentialKind.JWT, on_behalf_of=None)
    for key, value in fields.items():
        setattr(record, key, value)
    return record


def test_the_line_has_every_field_in_order() -> None:
    """The order is what docs/operations.md shows; times are milliseconds."""
    line = json.loads(_written(_record(status=200, sent_bytes=7, first_byte_at=1.5, operation="invoke")))

    assert line == {
        "time": "2023-11-14T22:13:20.250+00:00", "level": "info", "event": "request.finished", "request_id": "id-1",
        "client": "192.0.2.1", "principal": "alice", "credential": "jwt", "operation": "invoke", "method": "POST",
        "path": "/agent/invoke", "status": 200, "bytes": 7, "duration_ms": 1000.0, "first_byte_ms": 500.0,
        "end": "done",
    }  # fmt: skip
    assert list(line)[:4] == ["time", "level", "event", "request_id"]


@given(st.text(), st.text(), st.text())
def test_no_text_breaks_the_line(path: str, name: str, reason: str) -> None:
    """Quotes, controls, surrogates and line separators of a caller's stay inside their field, in plain ASCII."""
    line = _written(_record(path, name, reason=reason, fault="client"))
    fields = json.loads(line)

    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert (fields["path"] or "") == (path if len(path) <= LONGEST_PATH else path[:LONGEST_PATH] + "…")
    assert (fields["principal"], fields["reason"]) == (name, reason)


@given(st.text(), st.text())
def test_no_text_steers_a_terminal(path: str, name: str) -> None:
    """Readable lines hold no control character that a caller sent."""
    line = make_readable(_written(_record(path, name)), colours=False)

    assert line.isprintable()
    assert "\n" not in line


def test_a_long_path_is_cut() -> None:
    """Sixty thousand characters of a path are no reason for a line of sixty thousand."""
    assert len(_written(_record("/" + "x" * 60_000))) < 2 * LONGEST_PATH


def test_another_applications_logging_gets_the_line_too() -> None:
    """Where our handler is not the one, the line goes through `logging` with its fields."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(message)s %(fields)s"))
    log = logging.getLogger("agentflow_proxy.access")
    log.addHandler(handler)
    level, log.level = log.level, logging.INFO
    try:
        AccessLog().end(_record(), 2.0)
    finally:
        log.removeHandler(handler)
        log.level = level

    assert text.getvalue().startswith("request.finished {'request_id': 'id-1'")


def test_a_full_pipe_costs_lines_and_nothing_else() -> None:
    """Nobody reads: `write` goes on at once, so many lines are kept, the others are counted; then it is told."""
    reading, writing = os.pipe()
    writer = LineWriter(writing, most=50)
    for number in range(4000):
        writer.write(b"%d %b\n" % (number, b"x" * 100))
    lost = writer.dropped
    seen = b""
    while b"lines_dropped" not in seen:
        seen += os.read(reading, 65_536)
        writer.write(b"more\n")
    os.close(reading)

    assert lost > 2000
    assert seen.startswith(b"0 xxx")


def test_a_closed_pipe_is_borne(capfd: pytest.CaptureFixture[str]) -> None:
    """What cannot be written any more is counted."""
    reading, writing = os.pipe()
    os.close(reading)
    writer = LineWriter(writing)

    writer.write(b"gone\n")
    writer.flush(10)

    assert writer.dropped == 1
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_borne() -> None:
    """/dev/full is one."""
    with Path("/dev/full").open("wb") as full:
        writer = LineWriter(full.fileno())
        writer.write(b"x\n")
        writer.flush(10)

    assert writer.dropped == 1


@pytest.mark.parametrize(("style", "begins"), [("json", "{"), ("text", "2"), ("auto", "{")])
def test_the_format_is_a_setting(tmp_path: Path, style: str, begins: str) -> None:
    """`auto` is JSON where the stream is no terminal."""
    root, level = logging.getLogger(), logging.getLogger().level
    before = root.handlers
    with (tmp_path / "log").open("w") as stream:
        try:
            handler = configure_logging("info", stream, style)  # type: ignore[arg-type]  # as the settings have it
            logging.getLogger("x").warning("key_store.lost", extra={"fields": {"reason": "it is gone", "grace": 5}})
            handler.flush()
        finally:
            root.handlers = before
            root.setLevel(level)
    text = (tmp_path / "log").read_text()

    assert text.startswith(begins) or text[0].isdigit()
    assert ('reason="it is gone"' in text) == (style == "text")
