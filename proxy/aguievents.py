"""The events of a run over AG-UI: they pass as they come, less what a failed run says, and what was used is read.

Pure. The sidecar's events are one line each, `data: {"type":…}`; of a long one the beginning is held.
"""

import re
from typing import Any, Final, override

import pydantic_core

from proxy.ends import End
from proxy.framing import MESSAGES, RawLines
from proxy.model import Usage
from proxy.tallies import Tally

_ERROR: Final = b'"RUN_ERROR"'
_ERROR_HEAD: Final = b'data:{"type":"RUN_ERROR"'
_BLANK: Final = b" \t\r"
_LONGEST_HEAD: Final = 64
_HELD_BYTES: Final = 65_536
_TYPE: Final = re.compile(rb'data:\s*+\{\s*+"type"\s*+:\s*+"([A-Z_]++)"')
_WRITTEN: Final = frozenset({b"TEXT_MESSAGE_CONTENT", b"REASONING_MESSAGE_CONTENT", b"TOOL_CALL_ARGS"})
"""Events that carry a piece of what the model wrote, as `delta`, the last of their members."""
_RESULT: Final = b"TOOL_CALL_RESULT"
_DELTA: Final = b'"delta":'
_CONTENT: Final = b'"content":'


class AgUiLines(RawLines):
    """The events byte for byte, but for the one of a failed run, whose text may be an exception's."""

    mark = _ERROR

    @override
    def _is_error(self, beginning: bytes) -> bool | None:
        head = beginning[:_LONGEST_HEAD].translate(None, _BLANK)
        if head.startswith(_ERROR_HEAD):
            return True
        return None if _ERROR_HEAD.startswith(head) and len(beginning) < _LONGEST_HEAD else False

    @override
    def _safe(self, line: bytes) -> bytes:
        errors = self._errors
        errors.run_failed = True
        try:
            value: Any = pydantic_core.from_json(line.removeprefix(b"data:"))
        except ValueError:
            value = {}
        if errors.is_full:
            return line
        errors.note(value, line)
        kept = {name: value[name] for name in ("timestamp", "code") if isinstance(value.get(name), int | str)}
        told = {"type": "RUN_ERROR", "message": MESSAGES[End.UPSTREAM_ERROR], **kept}
        return b"data: " + pydantic_core.to_json(told)


class AgUiReader:
    """Estimates what a run has used, since the events do not say. Implements `usage.UsageReader`.

    `body` is the run's request, whose messages the model reads; what it answers comes in pieces.
    """

    def __init__(self, body: bytes) -> None:
        self.errors = 0
        self.turns = 0
        self._body = body
        self._tally = Tally()
        self._line = bytearray()
        self._beyond = 0
        self._written = 0

    def feed(self, chunk: bytes) -> None:
        """See `UsageReader.feed`."""
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            self._hold(line)
            if self._line.startswith(b"data:"):
                self._read(bytes(self._line))
            self._line.clear()
            self._beyond = 0
        self._hold(rest)

    def usage(self) -> Usage | None:
        """See `UsageReader.usage`."""
        return self._tally.usage()

    def _hold(self, part: bytes) -> None:
        room = _HELD_BYTES - len(self._line)
        self._line += part[:room]
        self._beyond += max(len(part) - room, 0)

    def _read(self, line: bytes) -> None:
        kind = _TYPE.match(line)
        if kind is None:
            return
        if kind[1] in _WRITTEN:
            self._read_body()
            size = self._size_after(_DELTA, line)
            if not self._written:
                self.turns += 1
            self._written += size
            self._tally.add_delta(b"%d" % self.turns, size)
        elif kind[1] == _RESULT:
            self._read_body()
            # The model reads it next, and what it has written itself.
            self._pass(self._written + self._size_after(_CONTENT, line))
            self._written = 0
        elif kind[1] == b"RUN_ERROR":
            self.errors += 1

    def _size_after(self, name: bytes, line: bytes) -> int:
        at = line.find(name)
        return max(len(line) + self._beyond - at - len(name) - 3, 1) if at > 0 else 1

    def _pass(self, size: int) -> None:
        self._tally.add_message(b"", {"role": "tool", "content": f"\0{size}"})

    def _read_body(self) -> None:
        """Take in what was asked, once, and only when something was answered."""
        body, self._body = self._body, b""
        if not body:
            return
        for message in pydantic_core.from_json(body).get("messages", ()):
            if message.get("role") in ("user", "tool"):
                self._tally.add_message(b"", message)
