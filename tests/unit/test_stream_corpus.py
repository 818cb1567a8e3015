"""A corpus of streams, each cut up in many ways: as lines they pass byte for byte, as events they mean the same."""

import json

import httpx
import pytest
from httpx_sse import EventSource

from proxy.ends import End
from proxy.framing import ErrorLines, EventFrames, LineTooLongError, RawLines
from proxy.negotiation import are_lines
from tests.support.corpus import CORPUS, ODD, OWN, PIECES, cut, meant
from tests.support.events import parse_events

MOST = 2 << 20


def errors(detail: str = "safe", told: list[dict[str, object]] | None = None) -> ErrorLines:
    """Make what reads error lines."""
    return ErrorLines("r-1", detail, (told if told is not None else []).append)  # type: ignore[arg-type]


def raw(stream: bytes, how: str) -> bytes:
    """Pass a stream on as lines."""
    lines = RawLines(errors(), MOST)
    return b"".join([*(lines.feed(piece) for piece in cut(stream, how) if piece), lines.finish()])


def framed(stream: bytes, how: str) -> bytes:
    """Pass a stream on as events, with the end of a whole one."""
    frames = EventFrames("r-1", errors(), MOST)
    return b"".join(
        [*(frames.feed(piece) for piece in cut(stream, how) if piece), frames.finish(), frames.end(End.DONE)]
    )


def test_the_corpus_is_large_enough() -> None:
    """At least a hundred streams."""
    assert len(CORPUS) >= 100


def test_the_corpus_tells_lines_from_events() -> None:
    """By its first bytes each of its streams is what it is meant to be."""
    assert [name for name, stream in CORPUS.items() if are_lines(stream) is False] == []
    assert [name for name, stream in OWN.items() if are_lines(stream) is not False] == []


@pytest.mark.parametrize("how", PIECES)
def test_lines_pass_byte_for_byte(how: str) -> None:
    """However a stream is cut up, what goes out is what came in; nothing in it is an error line."""
    assert [name for name, stream in CORPUS.items() if raw(stream, how) != stream] == []


@pytest.mark.parametrize("how", PIECES)
def test_events_mean_what_the_lines_mean(how: str) -> None:
    """Each line that is not blank is one event with its bytes and its name, in order, and then there is one end."""
    plain = {
        "another member first",
        "a name with a break",
        "a name that is an end",
        "an escaped name",
        "almost an error",
        "only carriage returns",
    }
    for name, stream in CORPUS.items():
        *events, end = parse_events(framed(stream, how))
        expected = meant(stream)
        assert [event.data for event in events] == [text for _, text in expected], name
        if name not in plain and "NUL" not in name:
            assert [event.name for event in events] == [kind for kind, _ in expected], name
        assert (end.name, end.data) == ("done", '{"end":"done"}'), name
        assert [event.last_id for event in (*events, end)] == [f"r-1-{n + 1}" for n in range(len(events) + 1)], name


@pytest.mark.parametrize("how", PIECES)
def test_httpx_sse_reads_the_same(how: str) -> None:
    """A library that people use finds the same events as the tests' own parser."""
    for name, stream in CORPUS.items():
        body = framed(stream, how)
        response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body)
        found = [(event.event, event.data) for event in EventSource(response).iter_sse()]
        own = [(event.name, event.data) for event in parse_events(body)]
        if "separators" not in name:  # httpx-sse splits at what Python calls a line end; the standard does not
            assert found == own, name


@pytest.mark.parametrize("how", PIECES)
def test_what_the_events_hold_is_the_same_json(how: str) -> None:
    """A carriage return between two tokens becomes another blank, and nothing else does."""
    for name, stream in CORPUS.items():
        if name.endswith("CR between tokens"):
            *events, _ = parse_events(framed(stream, how))
            assert [json.loads(event.data) for event in events] == [
                json.loads(line) for line in stream.split(b"\n") if line
            ], name


def test_no_name_of_upstreams_is_an_end() -> None:
    """The one terminal event is ours, whatever the sidecar calls its own."""
    events = parse_events(framed(ODD["a name that is an end"], "whole"))

    assert [event.name for event in events] == ["upstream_done", "upstream_stopped", "done"]


def test_a_line_that_is_whole_goes_out_at_once() -> None:
    """Each piece that ends a line gives its event, and a piece that ends none gives nothing."""
    frames = EventFrames("r-1", errors(), MOST)

    assert frames.feed(b'{"event":"mess') == b""
    assert frames.feed(b'age"}\n') == b'id: r-1-1\nevent: message\ndata: {"event":"message"}\n\n'


@pytest.mark.parametrize("beginning", [b'{"event":"message","x', b"hello", b'{"event":"e"', b"[", b'{ "event" : "m'])
def test_what_cannot_become_an_error_line_is_not_held(beginning: bytes) -> None:
    """Half a line goes out as soon as it is plain that it is no error line."""
    assert RawLines(errors(), MOST).feed(beginning) == beginning


def test_memory_is_bounded_by_the_longest_line() -> None:
    """A line over the limit ends a stream of events, whole or in pieces; lines themselves have no limit."""
    for pieces in ([b"x" * 101], [b"x" * 60, b"x" * 60], [b"x" * 101 + b"\n"], [b"a\n" + b"x" * 101]):
        frames = EventFrames("r-1", errors(), 100)
        with pytest.raises(LineTooLongError):
            for piece in pieces:
                frames.feed(piece)
    lines = RawLines(errors(), 100)
    assert lines.feed(b"x" * 101) == b"x" * 101


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        (b"", None),
        (b"\xef\xbb", None),
        (b"\xef\xbb\xbf", None),
        (b"\r\n \n", None),
        (b"dat", None),
        (b"e", None),
        (b"{", True),
        (b"\xef\xbb\xbf{", True),
        (b"hello", True),
        (b"dataset", True),
        (b"data:", False),
        (b"event: x", False),
        (b"\n\nid: 1", False),
        (b": ping", False),
        (b"retry: 1", False),
        (b"\n" * 1018 + b"event:", False),
        (b"\n" * 1023, None),
        (b"\n" * 1020 + b"dat", None),
        (b"\n" * 1020 + b"data", True),
        (b"\n" * 1020 + b"data: 1", True),
        (b"\n" * 1024, True),
        (b"\xef\xbb\xbf" + b" " * 1021, True),
    ],
)
def test_the_first_bytes_tell_lines_from_events(first: bytes, verdict: bool | None) -> None:
    """A body that begins with a field of server-sent events is one; until that is plain, nothing is decided.

    One of 1 KiB of blanks is lines, whatever follows and however it came.
    """
    assert are_lines(first) is verdict
    decided = [told for end in range(len(first)) if (told := are_lines(first[:end])) is not None]
    assert set(decided) <= {verdict}
