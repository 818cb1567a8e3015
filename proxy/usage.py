"""How many model tokens a run has used, read from its answer as it passes by.

Pure. Never holds a body: of a line or an answer's outline 64 KiB stay here, and one read more; most lines are searched,
not parsed. What the sidecar does not report is estimated from the bytes of text, four a token, and marked so.
"""

import re
from collections import OrderedDict
from typing import Any, Final, Literal, Protocol

import pydantic_core

from proxy.model import Usage
from proxy.outlines import HELD_BYTES, Outline, told_bytes

BYTES_A_TOKEN: Final = 4
_MOST_TOKENS: Final = 1 << 40
"""More than that nobody reports in earnest."""
_MOST_MESSAGES: Final = 128
"""Messages whose usage is remembered, so that one that comes again is not counted again."""
_HEAD: Final = 256
"""Where in a line its message's role stands, at the latest."""

# A delta as the sidecar writes it. What is written otherwise is parsed, which says the same and costs more.
_MESSAGE: Final = b'{"event":"message","message":{"message_id":'
_ASSISTANT: Final = b',"role":"assistant","content":['
_DELTA: Final = b'],"delta":true,"tools_calls":'
_PLAIN: Final = (b'null,"reasoning":null,', b'[],"reasoning":"",')
"""What follows in a delta that holds nothing but text; which of them, depends on who converts the model's answer."""
_FRAME: Final = 73
"""Bytes of those, and of a block of text without its text: `{"type":"text","text":"","annotations":[]}`."""
_USAGES: Final = b'"usages":{'
_TOTALS: Final = b'"total_input_tokens":'

_EVENT: Final = re.compile(rb'\s*+\{\s*+"event"\s*+:\s*+"([a-z]++)"')
_TEXTS: Final = ("text", "summary", "details", "args", "output", "transcript", "message")
"""The fields of a content block that a model reads or writes; media are not among them."""


class UsageReader(Protocol):
    """Is fed an answer's bytes, however they are parted, and can be asked at any time."""

    @property
    def turns(self) -> int:
        """Messages of the assistant that came whole."""

    @property
    def errors(self) -> int:
        """Events that told of an error."""

    def feed(self, chunk: bytes) -> None:
        """Read on. Never raises: what cannot be read counts as little as possible."""

    def usage(self) -> Usage | None:
        """Give what was used so far; None while nothing is known."""


def reader_for(kind: Literal["answer", "stream"]) -> UsageReader:
    """Give a reader of an invoke's one answer, or of a stream's lines."""
    return AnswerReader() if kind == "answer" else StreamReader()


class AnswerReader:
    """Reads the messages of an invoke's answer. Implements `UsageReader`.

    Only `data.messages` counts, which is this run's; `context` and `state` hold the thread's earlier runs too.
    """

    def __init__(self) -> None:
        self.turns = 0
        self.errors = 0
        self._outline = Outline()

    def feed(self, chunk: bytes) -> None:
        self._outline.feed(chunk)

    def usage(self) -> Usage | None:
        """See `UsageReader.usage`. Parses what is held, each time it is asked."""
        tally = _Tally()
        try:
            answer = pydantic_core.from_json(self._outline.held, allow_partial=True)
            data = answer["data"]
            for number, message in enumerate(data["messages"]):
                tally.add_message(pydantic_core.to_json(message.get("message_id", number)), message)
        except (ValueError, TypeError, KeyError, AttributeError):
            data = {}
            if _ASSISTANT[1:17] in self._outline.held:
                tally.add_unread(b"", len(self._outline.held))
        if self._outline.beyond and set(data) <= {"messages"}:
            tally.add_unread(b"beyond", self._outline.beyond)
        self.turns = tally.turns
        return tally.usage()


class StreamReader:
    """Reads the lines of a stream, one event each. Implements `UsageReader`.

    A message comes in deltas and then whole, sometimes under another id; only the whole one may report its usage.
    Events other than `message` repeat the thread's earlier messages, so they count nothing.
    """

    def __init__(self) -> None:
        self.errors = 0
        self._tally = _Tally()
        self._unfinished: Outline | None = None

    @property
    def turns(self) -> int:
        """See `UsageReader.turns`."""
        return self._tally.turns

    def feed(self, chunk: bytes) -> None:
        first = chunk.find(b"\n")
        if self._unfinished is None and first == len(chunk) - 1 and first <= HELD_BYTES:
            self._read(chunk)  # one line and no more, as the sidecar sends them
            return
        lines = chunk.split(b"\n")
        rest = lines.pop()
        for line in lines:
            if self._unfinished is None and len(line) <= HELD_BYTES:
                self._read(line)
            else:
                self._hold(line)
                self._finish()
        if rest:
            self._hold(rest)

    def usage(self) -> Usage | None:
        return self._tally.usage()

    def _hold(self, part: bytes) -> None:
        if self._unfinished is None:
            self._unfinished = Outline(only=_is_message)
        self._unfinished.feed(part)

    def _finish(self) -> None:
        line, self._unfinished = self._unfinished, None
        if line is not None:
            self._read(bytes(line.held), outlined=line.outlined)

    def _read(self, line: bytes, *, outlined: bool = False) -> None:
        if line.startswith(_MESSAGE) and not outlined:
            role = line.find(_ASSISTANT, len(_MESSAGE), _HEAD)
            end = line.find(_DELTA, role) if role > 0 else -1
            plain = end > 0 and line.startswith(_PLAIN, end + len(_DELTA))
            if plain and line.rfind(_USAGES, end) < 0:  # searched from the right, which is faster
                self._tally.add_delta(line[len(_MESSAGE) : role], max(end - role - _FRAME, 0))
                return
        event = _EVENT.match(line)
        name = event[1] if event is not None else b"message"
        if name == b"error":
            self.errors += 1
        elif name == b"message" or (name == b"updates" and line.rfind(_TOTALS) > 0):
            self._parse(line)

    def _parse(self, line: bytes) -> None:
        try:
            event = pydantic_core.from_json(line, allow_partial=True)
            message, data = event.get("message"), event.get("data")
            if event.get("event") == "message" and message is not None:
                self._tally.add_message(pydantic_core.to_json(message.get("message_id")), message)
            elif event.get("event") == "updates" and isinstance(data, dict):
                self._tally.set_totals(data)
        except (ValueError, TypeError, AttributeError):
            if _ASSISTANT[1:17] in line:
                self._tally.add_unread(line[len(_MESSAGE) : len(_MESSAGE) + 40], len(line))


class _Tally:
    """The sum over a run's messages, each counted once, however often it comes."""

    def __init__(self) -> None:
        self.turns = 0
        self._known: OrderedDict[bytes, tuple[Usage, int]] = OrderedDict()
        """By message: what it used, and the bytes of text of the deltas seen, or -1 when it came whole."""
        self._sum = [0, 0, 0, 0]
        """Input, output and total tokens, and how many messages were estimated."""
        self._totals: Usage | None = None
        self._passed = 0
        """Bytes of text of whole messages: what the model reads again at its next call, as far as it passed by."""
        self._open: bytes | None = None
        self._open_text = 0

    def add_delta(self, message_id: bytes, text: int) -> None:
        """Take in a piece of a message of the assistant, with so many bytes of text."""
        if message_id != self._open:
            self._settle()
            known = self._known.get(message_id)
            if known is not None and (known[1] < 0 or not known[0].estimated):
                return  # it came whole: a late piece of it says nothing new
            self._open = message_id
            self._open_text = known[1] if known is not None else 0
        self._open_text += text

    def add_message(self, message_id: bytes, message: dict[str, Any]) -> None:
        """Take in a message, of whatever role, whole or not."""
        text, whole = _text_bytes(message), message.get("delta") is not True
        if message.get("role") == "assistant":
            reported = _reported(message.get("usages"), "prompt_tokens", "completion_tokens")
            if reported is None and not whole:
                self.add_delta(message_id, text)
                return
            if whole:
                self._open = None  # it stands for the deltas before it, whatever id they had
            known = self._known.get(message_id)
            again = known is not None and known[1] < 0
            if reported is None and known is not None and (again or not known[0].estimated):
                reported = known[0]
            self.turns += whole and not again
            self._put(message_id, reported or self._estimate(text), -1 if whole else 0)
            if again:
                return
        if whole:
            self._settle()
            self._passed += text

    def add_unread(self, message_id: bytes, text: int) -> None:
        """Take in what looks like messages of the assistant but could not be read."""
        self._put(message_id, self._estimate(text), -1)

    def set_totals(self, data: dict[str, Any]) -> None:
        """Take in the sidecar's own sum over the run."""
        self._totals = _reported(data, "total_input_tokens", "total_output_tokens")

    def usage(self) -> Usage | None:
        """Give the sum so far; None while there is nothing to sum."""
        read, written, total, estimates = self._sum
        if self._open is not None:
            known = self._known.get(self._open)
            was, now = _figures(known[0] if known is not None else None), _figures(self._estimate(self._open_text))
            read, written, total, estimates = (a + b - c for a, b, c in zip(self._sum, now, was, strict=True))
        if self._totals is not None and self._totals.total_tokens > total:
            return self._totals  # it knows of messages that did not pass by
        something = self._known or self._open is not None
        return Usage(read, written, total, estimated=estimates > 0) if something else None

    def _settle(self) -> None:
        if self._open is not None:
            self._put(self._open, self._estimate(self._open_text), self._open_text)
            self._open = None

    def _estimate(self, text: int) -> Usage:
        read, written = -(-self._passed // BYTES_A_TOKEN), -(-text // BYTES_A_TOKEN)
        return Usage(read, written, read + written, estimated=True)

    def _put(self, message_id: bytes, usage: Usage, text: int) -> None:
        old, _ = self._known.pop(message_id, (None, 0))
        self._sum = [
            was + now - before for was, now, before in zip(self._sum, _figures(usage), _figures(old), strict=True)
        ]
        self._known[message_id] = usage, text
        if len(self._known) > _MOST_MESSAGES:
            self._known.popitem(last=False)


def _figures(usage: Usage | None) -> tuple[int, int, int, int]:
    if usage is None:
        return 0, 0, 0, 0
    return usage.input_tokens, usage.output_tokens, usage.total_tokens, usage.estimated


def _reported(value: object, read: str, written: str) -> Usage | None:
    """Read reported figures; None where there are none, also when all are 0, which AgentFlow writes for unknown."""
    if not isinstance(value, dict):
        return None
    figures = [value.get(name) for name in (read, written, "total_tokens")]
    read_tokens, written_tokens, total = (
        figure if type(figure) is int and 0 <= figure <= _MOST_TOKENS else 0 for figure in figures
    )
    total = max(total, read_tokens + written_tokens)
    return Usage(read_tokens, written_tokens, total, estimated=False) if total else None


def _text_bytes(message: dict[str, Any]) -> int:
    """Count the bytes of text of a message, as JSON writes them."""
    content = message.get("content")
    texts: list[object] = [message.get("reasoning")]
    if isinstance(content, list):
        texts += [block.get(name) for block in content if isinstance(block, dict) for name in _TEXTS]
    else:
        texts.append(content)
    return sum(_json_bytes(text) for text in texts if text is not None)


def _json_bytes(text: object) -> int:
    if not isinstance(text, str):
        return len(pydantic_core.to_json(text))
    told = told_bytes(text)
    if told is not None:
        return told
    return len(pydantic_core.to_json(text)) - 2


def _is_message(line: bytes) -> bool:
    event = _EVENT.match(line)
    return event is None or event[1] == b"message"
