"""What a client is told of the sidecar's error lines, in either form of a stream."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ends import End
from proxy.framing import ErrorLines, EventFrames, RawLines
from tests.support.events import parse_events
from tests.support.steps import steps

SECRET = "postgres://admin:hunter2@db/agent"
STATE = b'{"context":[{"role":"user","content":[{"type":"text","text":"a prompt"}]}],"pad":"' + b"x" * 500 + b'"}'
FIRST = (
    b'{"event":"error","message":null,"state":' + STATE + b',"data":{"status":"invoked_graph","node":"MAIN","reason":"'
    + SECRET.encode() + b'"},"thread_id":"t~1","run_id":"run-1"}'
)  # fmt: skip
LAST = b'{"event":"error","message":null,"state":null,"data":{"reason":"' + SECRET.encode() + b'"},"thread_id":null}'
TOOL = (
    b'{"event":"error","message":null,"data":{"status":"tool_failed","tool_name":"add","tool_call_id":"c-1",'
    b'"node":"TOOL","args":{"a":1},"error":"' + SECRET.encode() + b'"},"thread_id":"t~1","run_id":"run-1"}'
)
LINE = b'{"event":"message","message":{"content":[{"type":"text","text":"{\\"event\\":\\"error\\"}"}]}}'
STREAM = b"\n".join([LINE, TOOL, LINE, FIRST, LAST, b""])


class Reader:
    """Both forms of the same stream, fed in pieces of one size."""

    def __init__(self, detail: str = "safe", size: int = 1 << 20, most: int = 1 << 20) -> None:
        self.told: list[dict[str, Any]] = []
        self.errors = ErrorLines("r-1", detail, self.told.append)  # type: ignore[arg-type]
        self.size = size
        self.lines = RawLines(self.errors, most)
        self.frames = EventFrames("r-1", self.errors, most)

    def raw(self, stream: bytes) -> bytes:
        """Pass it on as lines."""
        pieces = [self.lines.feed(stream[at : at + self.size]) for at in range(0, len(stream), self.size)]
        return b"".join(pieces) + self.lines.finish()

    def events(self, stream: bytes) -> list[tuple[str, str]]:
        """Pass it on as events."""
        pieces = [self.frames.feed(stream[at : at + self.size]) for at in range(0, len(stream), self.size)]
        end = End.UPSTREAM_ERROR if self.errors.run_failed else End.DONE
        body = b"".join([*pieces, self.frames.finish(), self.frames.end(end)])
        return [(event.name, event.data) for event in parse_events(body)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 100, 1 << 20])
def test_error_lines_lose_what_is_nobodys_business(size: int) -> None:
    """Wherever they are cut, error lines come as safe ones, and all other lines as they were."""
    lines = Reader(size=size).raw(STREAM).split(b"\n")

    assert [lines[0], lines[2], lines[5]] == [LINE, LINE, b""]
    assert SECRET.encode() not in b"".join(lines)
    assert b"a prompt" not in b"".join(lines)
    told = [json.loads(lines[at]) for at in (1, 3, 4)]
    assert [line["event"] for line in told] == ["error"] * 3
    assert [line["data"]["code"] for line in told] == ["tool_failed", "upstream_error", "upstream_error"]
    assert all(line["data"]["request_id"] == "r-1" and line["data"]["message"] for line in told)


def test_what_agentflows_clients_read_is_there() -> None:
    """A safe line has the members of AgentFlow's own: the ids, and a reason in `data`."""
    tool, first = (json.loads(line) for line in Reader().raw(TOOL + b"\n" + FIRST + b"\n").splitlines())

    assert (tool["thread_id"], tool["run_id"]) == ("t~1", "run-1")
    assert {key: tool["data"][key] for key in ("status", "tool_name", "tool_call_id", "node")} == {
        "status": "tool_failed",
        "tool_name": "add",
        "tool_call_id": "c-1",
        "node": "TOOL",
    }
    assert first["data"]["reason"] == first["data"]["message"] == "The run failed."
    assert (first["message"], first["state"]) == (None, None)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_failed_run_is_one_terminal_event(size: int) -> None:
    """Of both error lines of a failed run one event remains, and it is the last; a failed tool ends nothing."""
    events = Reader(size=size).events(STREAM)

    assert [name for name, _ in events] == ["message", "tool_failed", "message", "error"]
    assert json.loads(events[-1][1])["data"]["code"] == "upstream_error"
    assert SECRET not in str(events)


def test_a_failed_tool_is_no_failed_run() -> None:
    """The run goes on after it, so its end may still be a good one."""
    reader = Reader()
    reader.raw(TOOL + b"\n" + LINE + b"\n")

    assert not reader.errors.run_failed


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_full_detail_passes_everything(size: int) -> None:
    """For development: byte for byte as lines; as events each line is one, and the end still is one more."""
    reader = Reader("full", size=size)

    assert reader.raw(STREAM) == STREAM
    assert reader.errors.run_failed
    events = Reader("full", size=size).events(STREAM)
    assert [name for name, _ in events] == [
        "message",
        "tool_failed",
        "message",
        "upstream_error",
        "upstream_error",
        "error",
    ]
    assert events[3][1] == FIRST.decode()


def test_only_where_it_was_asked_for_the_rest_is_logged() -> None:
    """`log` tells what the client is not told, without the state; `safe` tells nobody."""
    quiet, loud = Reader("safe"), Reader("log")

    assert quiet.raw(STREAM) == loud.raw(STREAM)
    assert quiet.told == []
    assert [said.get("reason") for said in loud.told] == [None, SECRET, SECRET]
    assert loud.told[0]["error"] == SECRET
    assert "a prompt" not in str(loud.told)


def test_what_is_logged_is_bounded() -> None:
    """An endless reason does not fill the log."""
    reader = Reader("log")
    reader.raw(b'{"event":"error","data":{"reason":"' + b"x" * 100_000 + b'"}}\n')

    assert len(str(reader.told)) < 5000


@pytest.mark.parametrize(
    "line",
    [
        b'{"event":"error"}',
        b'{ "event" : "error" }',
        b'\xef\xbb\xbf{"event":"error","data":null}',
        b'\t{"event":"error","data":[1]}',
        b'{"event":"error","data":{"reason":"' + SECRET.encode(),
        b'{"event":"error" no JSON',
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_whatever_begins_as_an_error_line_is_told_safely(line: bytes, end: bytes) -> None:
    """Also one that is broken, has nothing in it, or is the last and has no newline."""
    reader = Reader(size=3)
    told = reader.raw(LINE + b"\n" + line + end)

    assert told.startswith(LINE + b"\n")
    assert SECRET.encode() not in told
    assert json.loads(told.splitlines()[1])["data"]["code"] == "upstream_error"
    assert reader.errors.run_failed


def test_an_endless_error_line_fills_no_memory() -> None:
    """Of an error line only so much is held as is needed to know that it is one."""
    reader = Reader(size=1000, most=10_000)
    told = reader.raw(b'{"event":"error","state":"' + b"x" * 1_000_000 + b'"}\n' + LINE + b"\n")

    assert told.endswith(b"\n" + LINE + b"\n")
    assert len(told) < 1000
    assert sum(map(len, reader.lines._held)) == 0


def test_full_detail_of_an_endless_error_line_is_whole() -> None:
    """What is over the bound is passed on, not held and not lost."""
    stream = b'{"event":"error","state":"' + b"x" * 1_000_000 + b'"}\n' + LINE + b"\n"
    reader = Reader("full", size=1000, most=10_000)

    assert reader.raw(stream) == stream
    assert reader.errors.run_failed


PIECES = [
    b"\n",
    b"\r\n",
    b"{}\n",
    b" ",
    b'"error"',
    b'{"event":',
    b'{"event":"err or"}\n',
    LINE,
    TOOL,
    LAST + b"\n",
    b"x" * 70,
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join), st.lists(st.integers(0, 2000), max_size=9))
def test_where_lines_are_cut_changes_nothing(stream: bytes, borders: list[int]) -> None:
    """Lines that go on together, line by line, or by the byte, are the same."""
    cuts = sorted({0, len(stream), *(border % (len(stream) + 1) for border in borders)})
    form = Reader().lines
    parted = b"".join([*(form.feed(stream[at:to]) for at, to in itertools.pairwise(cuts)), form.finish()])

    assert parted == Reader().raw(stream) == Reader(size=1).raw(stream)


@pytest.mark.parametrize("unit", [b"\n", b"\r\n", b"{}\n", b"  \n"])
@pytest.mark.parametrize("last", [b"", b"{", b'"error"\n', b'{"event":"error"}\n'])
def test_a_flood_of_short_lines_is_no_step_each(unit: bytes, last: bytes) -> None:
    """Only a line that may be an error line is looked at by itself."""
    assert steps(Reader().lines.feed, unit * 50_000 + last) < 200
