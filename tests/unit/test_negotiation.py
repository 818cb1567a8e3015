"""Which form of a stream a client gets by what it accepts (RFC 9110 §12.5.1), and by what upstream sends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import Headers
from proxy.negotiation import Wish, may_be_lines, wish_of


def accepting(*values: str) -> Headers:
    """Write header fields."""
    return [(b"accept", value.encode("latin-1")) for value in values]


@pytest.mark.parametrize(
    ("values", "wish"),
    [
        ([], Wish.AS_IT_IS),
        (["*/*"], Wish.AS_IT_IS),
        (["text/*"], Wish.AS_IT_IS),
        (["application/json"], Wish.AS_IT_IS),
        (["application/x-ndjson, application/json"], Wish.LINES),
        (["application/x-ndjson"], Wish.LINES),
        (["application/x-ndjson;q=0"], Wish.AS_IT_IS),
        (["text/event-stream"], Wish.EVENTS),
        (["Text/Event-Stream"], Wish.EVENTS),
        (["text/event-stream, */*"], Wish.EVENTS),
        (["application/json, text/event-stream"], Wish.EVENTS),
        (["application/json", "text/event-stream"], Wish.EVENTS),
        (["text/event-stream;q=0"], Wish.AS_IT_IS),
        (["text/event-stream;q=0.000, */*"], Wish.AS_IT_IS),
        (["text/event-stream; q=0.5, application/x-ndjson"], Wish.LINES),
        (["text/event-stream; q=0.5, application/json"], Wish.AS_IT_IS),
        (["text/event-stream;Q=0.5, application/x-ndjson;q=0.4"], Wish.EVENTS),
        (["text/event-stream;q=0.1, text/event-stream"], Wish.EVENTS),
        (["text/event-stream;charset=utf-8"], Wish.EVENTS),
        (["text/event-stream;q=high"], Wish.AS_IT_IS),
        (["text/event-streams"], Wish.AS_IT_IS),
        (["x/text/event-stream"], Wish.AS_IT_IS),
    ],
)
def test_events_go_to_who_names_them_and_prefers_nothing_else(values: list[str], wish: Wish) -> None:
    """Weights are honoured, several fields are one list, and a range names nothing."""
    assert wish_of(accepting(*values)) is wish


@given(st.binary(max_size=60))
def test_any_field_has_a_meaning(value: bytes) -> None:
    """Whatever a client writes, it is read as something."""
    assert wish_of([(b"accept", b"text/event-stream;" + value), (b"accept", value)]) in Wish


@pytest.mark.parametrize(
    ("media", "coding", "open_"),
    [
        (b"text/event-stream", b"", True),
        (b"text/event-stream; charset=utf-8", b"identity", True),
        (b"Application/X-NDJSON", b"", True),
        (b"text/event-stream", b"gzip", False),
        (b"application/json", b"", False),
        (b"", b"", False),
    ],
)
def test_only_a_plain_stream_may_be_lines(media: bytes, coding: bytes, open_: bool) -> None:
    """What is compressed, or of another type, is passed on unread."""
    assert may_be_lines([(b"content-type", media), (b"content-encoding", coding)]) is open_
