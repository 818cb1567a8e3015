"""A parser of server-sent events as the HTML Living Standard has it (§9.2.6), written from its text alone.

It is the tests' own, so that what the proxy frames is not judged by what the proxy thinks.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One dispatched event."""

    name: str
    data: str
    last_id: str


def parse_events(body: bytes) -> list[Event]:
    """Give the events of a whole stream; an event that no blank line ends is discarded."""
    text = body.decode("utf-8", "replace").removeprefix("\ufeff")
    events: list[Event] = []
    name, data, last_id = "", [], ""
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        if not line:
            if data:
                events.append(Event(name or "message", "\n".join(data), last_id))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            last_id = value
    return events


def comments(body: bytes) -> list[bytes]:
    """Give the comment lines of a stream."""
    return [line for line in body.split(b"\n") if line.startswith(b":")]
