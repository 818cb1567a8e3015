"""AG-UI's events pass byte for byte, but for what the exception of a failed run says."""

import json
from typing import Any

import pytest
from ag_ui.core import RunErrorEvent, TextMessageContentEvent
from ag_ui.encoder import EventEncoder

from proxy.aguievents import AgUiLines
from proxy.framing import ErrorLines
from proxy.model import ErrorDetail

ENCODER = EventEncoder()
SAID = 'Say RUN_ERROR or "RUN_ERROR": ' + "x" * 200
TEXT = ENCODER.encode(TextMessageContentEvent(message_id="m", delta=SAID)).encode()
FAILED = ENCODER.encode(RunErrorEvent(message="psycopg: password=hunter2", code="GRAPH_ERROR")).encode()


def lines(detail: ErrorDetail = "safe") -> tuple[ErrorLines, AgUiLines, list[dict[str, Any]]]:
    """Make what writes the events, and where it logs."""
    told: list[dict[str, Any]] = []
    errors = ErrorLines("r-1", detail, told.append)
    return errors, AgUiLines(errors, 4096), told


@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 10_000])
def test_a_failed_run_does_not_say_what_the_exception_said(size: int) -> None:
    """However the bytes are parted; every other event passes byte for byte."""
    errors, form, _ = lines()
    data = TEXT + FAILED + TEXT
    out = b"".join(form.feed(data[at : at + size]) for at in range(0, len(data), size)) + form.finish()

    event = json.loads(out.removeprefix(TEXT).removesuffix(TEXT).removeprefix(b"data: "))
    assert event == {"type": "RUN_ERROR", "message": "The run failed.", "code": "GRAPH_ERROR"}
    assert errors.run_failed


@pytest.mark.parametrize("size", [1, 64, 100_000])
def test_an_endless_failure_fills_no_memory(size: int) -> None:
    """Its text is dropped beyond what a line may have."""
    _, form, _ = lines()
    data = FAILED[:40] + b"x" * 50_000
    out = b"".join(form.feed(data[at : at + size]) for at in range(0, len(data), size))

    assert out + form.finish() == b'data: {"type":"RUN_ERROR","message":"The run failed."}\n'
    assert form._size <= 4096 + size


@pytest.mark.parametrize(("detail", "told"), [("full", FAILED), ("log", b"")])
def test_full_detail_passes_it_and_log_logs_it(detail: ErrorDetail, told: bytes) -> None:
    """As it is for error lines."""
    _, form, logged = lines(detail)
    out = form.feed(FAILED)

    assert out == (told or out)
    assert [each["message"] for each in logged] == (["psycopg: password=hunter2"] if detail == "log" else [])


def test_a_failed_run_that_is_no_json_is_told_safely() -> None:
    """Nothing of it passes."""
    _, form, _ = lines()

    assert form.feed(b'data: {"type":"RUN_ERROR","message":"hunter2\n') == (
        b'data: {"type":"RUN_ERROR","message":"The run failed."}\n'
    )
