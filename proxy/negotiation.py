"""Which form of a stream a client gets: what it accepts, and what upstream turns out to send.

Pure.
"""

import re
from enum import StrEnum
from typing import Final

from proxy.model import Headers

LINES_TYPE: Final = b"application/x-ndjson"
EVENTS_TYPE: Final = b"text/event-stream"
_BOM: Final = b"\xef\xbb\xbf"
_FIELDS: Final = (b":", b"data:", b"event:", b"id:", b"retry:")
_LOOKED_AT: Final = 1024
"""Bytes of a body that are looked at: one of so many blanks is lines, so that no more need be held."""
_Q: Final = re.compile(r";\s*q\s*=\s*([0-9.]*)")


class Wish(StrEnum):
    """How a client wants a stream written."""

    AS_IT_IS = "as it is"
    LINES = "lines"
    EVENTS = "events"
    AG_UI = "ag-ui"
    """As it is, which is events of AG-UI's own."""


def wish_of(headers: Headers) -> Wish:
    """Read `Accept` (RFC 9110 §12.5.1): events where text/event-stream is named and nothing that is lines is preferred.

    A range (`*/*`, `text/*`) names neither, so it gets what upstream sends.
    """
    values = [value for name, value in headers if name == b"accept"]
    if not values:
        return Wish.AS_IT_IS
    text = b",".join(values).decode("latin-1").lower()
    if "event-stream" not in text and "x-ndjson" not in text:
        return Wish.AS_IT_IS
    weights: dict[str, float] = {}
    for part in text.split(","):
        media = part.partition(";")[0].strip()
        weights[media] = max(weights.get(media, 0.0), _weight(part))
    events, lines = weights.get("text/event-stream", 0.0), weights.get("application/x-ndjson", 0.0)
    if events > 0 and events >= max(lines, weights.get("application/json", 0.0)):
        return Wish.EVENTS
    return Wish.LINES if lines > 0 else Wish.AS_IT_IS


def _weight(part: str) -> float:
    found = _Q.search(part)
    if found is None:
        return 1.0
    try:
        return min(float(found[1]), 1.0)
    except ValueError:
        return 0.0


def may_be_lines(headers: Headers) -> bool:
    """Say whether an answer's head leaves it open that the body is JSON lines: by its type, and not compressed."""
    media = coding = b""
    for name, value in headers:
        if name == b"content-type":
            media = value.partition(b";")[0].strip().lower()
        elif name == b"content-encoding":
            coding = value.lower()
    return media in (EVENTS_TYPE, LINES_TYPE) and coding in (b"", b"identity")


def are_lines(first: bytes) -> bool | None:
    """Say whether a body that begins so is lines rather than server-sent events; None while that cannot be told.

    It can be told of 1 KiB, however it came.
    """
    head = first[:_LOOKED_AT]
    if _BOM.startswith(head[:3]) and len(head) < len(_BOM):
        return None
    rest = head.removeprefix(_BOM).lstrip(b" \t\r\n")
    if any(rest.startswith(field) for field in _FIELDS):
        return False
    is_open = len(head) < _LOOKED_AT and any(field.startswith(rest) for field in _FIELDS)
    return None if is_open else True
