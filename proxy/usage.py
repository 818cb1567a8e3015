"""How many model tokens a run has used, read from its answer as it passes by.

Pure. Never holds a body: of a line or an answer's outline 64 KiB stay here, and one read more; most lines are searched,
not parsed. What the sidecar does not report is estimated from the bytes of text, four a token, and marked so.
"""

import re
from typing import Any, Final, Literal, Protocol, override

import pydantic_core

from proxy.model import Usage
from proxy.outlines import HELD_BYTES, Outline
from proxy.tallies import Tally, json_bytes, reported

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
_TIME: Final = b',"metadata":'
"""What follows a message's time."""
_USAGES: Final = b'"usages":{'
_TOTALS: Final = b'"total_input_tokens":'

_SHORTEST: Final = 16
"""Bytes without a newline that whatever counts has at the least: `{"event":"error"`."""
_MORE: Final = re.compile(rb"[^\n]{%d}" % _SHORTEST)

_EVENT: Final = re.compile(rb'\s*+\{\s*+"event"\s*+:\s*+"([a-z]++)"')

_TYPE: Final = re.compile(rb'data:\s*+\{\s*+"type"\s*+:\s*+"([A-Z_]++)"')
"""How an event of AG-UI begins."""
_BEGINS: Final = frozenset({b"TEXT_MESSAGE_START", b"REASONING_MESSAGE_START"})
_WRITES: Final = frozenset({b"TEXT_MESSAGE_CONTENT", b"REASONING_MESSAGE_CONTENT", b"TOOL_CALL_ARGS"})
_IS_SAID: Final = b"TEXT_MESSAGE_END"
_ASKS: Final = frozenset({"user", "tool"})
"""Roles of the messages of AG-UI's request that are new to the thread."""
_IS_READ: Final = b"TOOL_CALL_RESULT"
_FAILS: Final = b"RUN_ERROR"


type Form = Literal["answer", "stream", "ag-ui"]
"""How an answer is written."""


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


def reader_for(form: Form, *, asked: bytes = b"") -> UsageReader:
    """Give a reader of an invoke's one answer, of a stream's lines, or of AG-UI's events.

    AG-UI does not repeat the messages that were `asked` with, the run's body.
    """
    if form == "ag-ui":
        return AgUiReader(asked)
    return AnswerReader() if form == "answer" else StreamReader()


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
        tally = Tally()
        try:
            answer = pydantic_core.from_json(self._outline.held, allow_partial=True)
            data = answer["data"]
            if not self._outline.outlined and (told := self._reported(data["messages"])) is not None:
                return told
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

    def _reported(self, messages: list[Any]) -> Usage | None:
        """Give the sum where each message of the assistant came once, whole, and told what it used; else None.

        That is what a provider's answers do; then nobody asks how much text there is.
        """
        names: set[str] = set()
        read = written = total = 0
        for message in messages:
            if not isinstance(message, dict):
                return None
            if message.get("role") == "assistant":
                name, usage = message.get("message_id"), reported(message.get("usages"))
                if usage is None or not isinstance(name, str) or name in names or message.get("delta") is True:
                    return None
                names.add(name)
                read += usage.input_tokens
                written += usage.output_tokens
                total += usage.total_tokens
        self.turns = len(names)
        return Usage(read, written, total, estimated=False) if names else None


class StreamReader:
    """Reads the lines of a stream, one event each. Implements `UsageReader`.

    A message comes in deltas and then whole, sometimes under another id; only the whole one may report its usage.
    Events other than `message` repeat the thread's earlier messages, so they count nothing.
    """

    def __init__(self) -> None:
        self.errors = 0
        self._tally = Tally()
        self._unfinished: Outline | None = None
        self._id = self._prefix = b""
        self._tail = b"\0"  # no line ends so
        self._begin = self._reach = 0

    @property
    def turns(self) -> int:
        """See `UsageReader.turns`."""
        return self._tally.turns

    def feed(self, chunk: bytes) -> None:
        begin, end = 0, chunk.find(b"\n") + 1
        if end == len(chunk) and self._unfinished is None and end <= HELD_BYTES and end:
            self._take(chunk)  # one line and no more, as the sidecar sends them
            return
        while end:
            size = end - begin
            if self._unfinished is not None or size > HELD_BYTES:
                self._hold(chunk[begin:end])
                self._finish()
            elif size > _SHORTEST:
                self._take(chunk[begin:end])
            else:  # it says nothing; and since it may be the first of a million, so do all that follow
                more = _MORE.search(chunk, end)
                end = more.start() if more is not None else chunk.rfind(b"\n") + 1
            begin, end = end, chunk.find(b"\n", end) + 1
        if begin < len(chunk):
            self._hold(chunk[begin:])

    def usage(self) -> Usage | None:
        return self._tally.usage()

    def _take(self, line: bytes) -> None:
        """Take in a line; mostly it is one that differs from the last in its text and its time alone."""
        if line.startswith(self._prefix) and line.endswith(self._tail):
            delta = line.find(_DELTA, -self._reach)
            if delta > 0:
                self._tally.add_delta(self._id, max(delta - self._begin, 0))
                return
        self._read(line)

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
                self._learn(line, role, end)
                return
        event = _EVENT.match(line)
        name = event[1] if event is not None else b"message"
        if name == b"error":
            self.errors += 1
        elif name == b"message" or (name == b"updates" and line.rfind(_TOTALS) > 0):
            self._parse(line)

    def _learn(self, line: bytes, role: int, end: int) -> None:
        """Remember a delta without its text and its time, so that the next of its message need not be searched.

        What ends as this line does reports no usage, and has no room for `_DELTA` but at its own place.
        """
        time = line.find(_TIME, end)
        if time > 0 and line.endswith(b"\n"):
            self._id, self._prefix = line[len(_MESSAGE) : role], line[: role + len(_ASSISTANT)]
            self._tail, self._begin = line[time:], role + _FRAME
            self._reach = len(line) - end + len(_DELTA) // 2

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


class AgUiReader(StreamReader):
    """Reads server-sent events of AG-UI, which report no usage: all of it is estimated. Implements `UsageReader`.

    A call of the model reasons, says, and asks for tools; the next begins with a tool's result, or says more.
    """

    def __init__(self, asked: bytes = b"") -> None:
        super().__init__()
        self._asked = asked
        self._calls = self._written = 0
        self._said = False

    @override
    def _read(self, line: bytes, *, outlined: bool = False) -> None:
        kind = _TYPE.match(line)
        name = kind[1] if kind is not None else b""
        if name in _WRITES:
            self._take_asked()
            text = _member(line, "delta")
            self._written += text
            self._tally.add_delta(b"%d" % self._calls, text)
        elif name == _IS_READ:
            self._begin_call()
            self._tally.add_context(_member(line, "content"))
        elif name == _IS_SAID:
            self._said = True
            self._tally.turns += 1
        elif name in _BEGINS and self._said:
            self._begin_call()
        elif name == _FAILS:
            self.errors += 1

    def _take_asked(self) -> None:
        """Count the messages that the model reads, once it has answered."""
        asked, self._asked = self._asked, b""
        for message in pydantic_core.from_json(asked)["messages"] if asked else ():
            if message.get("role") in _ASKS:
                self._tally.add_context(json_bytes(message.get("content") or ""))

    def _begin_call(self) -> None:
        self._tally.add_context(self._written)
        self._calls += 1
        self._written, self._said = 0, False


def _member(line: bytes, name: str) -> int:
    """Count the bytes of a text in an event; all of them, where it cannot be read."""
    try:
        return json_bytes(pydantic_core.from_json(line.partition(b":")[2], allow_partial=True)[name])
    except (ValueError, KeyError, TypeError):
        return len(line)


def _is_message(line: bytes) -> bool:
    event = _EVENT.match(line)
    return event is None or event[1] == b"message"
