"""How a stream of lines is written: as it came, or as server-sent events; and what of an error line is told.

Pure. Bytes go in as they arrive, cut anywhere, and bytes come out; whatever is not an error line stays as it is.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pydantic_core

from proxy.ends import End
from proxy.model import ErrorDetail

PING: Final = b": ping\n\n"
RETRY_MILLISECONDS: Final = 1000

type Told = Callable[[dict[str, Any]], None]
"""Is given what an error line said and its reader is not told."""

_BOM: Final = b"\xef\xbb\xbf"
_BLANK: Final = b" \t\r"
_ERROR: Final = b'"error"'
_ERROR_HEAD: Final = b'{"event":"error"'
_LONGEST_HEAD: Final = 64
"""An error line begins within so many bytes, blanks included."""
_NAME: Final = re.compile(rb'\s*\{\s*"event"\s*:\s*"([A-Za-z0-9_.:-]{1,64})"')
_LOGGED: Final = 4096
_TOOL_FAILED: Final = "tool_failed"

MESSAGES: Final[dict[End, str]] = {
    End.UPSTREAM_ERROR: "The run failed.",
    End.UPSTREAM_CUT: "The agent's answer was cut off.",
    End.UPSTREAM_MALFORMED: "The agent's answer cannot be read.",
    End.LINE_TOO_LONG: "The agent sent a line that is too long.",
    End.IDLE_DEADLINE: "The agent's answer did not go on in time.",
    End.FIRST_BYTE_DEADLINE: "The agent did not answer in time.",
    End.TOTAL_DEADLINE: "The answer took too long.",
    End.SHUTDOWN: "This proxy is shutting down; send the request again.",
    End.BUDGET: "The token budget is spent.",
}
"""What a client is told of an end, where it is told in words."""


class ErrorLines:
    """Reads what error lines say, and writes what of it is told."""

    def __init__(self, request_id: str, detail: ErrorDetail, told: Told) -> None:
        self._request_id = request_id
        self._detail = detail
        self._told = told
        self.is_full = detail == "full"
        """Error lines are told as they are."""
        self.run_failed = False
        """A line said that the run failed; one about a tool does not."""

    def safe(self, line: bytes) -> tuple[bytes, str]:
        """Give what is told of an error line, and its status; the line itself with the detail `full`."""
        value = _decoded(line)
        data = value.get("data")
        said: dict[str, Any] = data if isinstance(data, dict) else {}
        status = _TOOL_FAILED if said.get("status") == _TOOL_FAILED else End.UPSTREAM_ERROR.value
        self.run_failed |= status != _TOOL_FAILED
        if self.is_full:
            return line, status
        self.note(said, line)
        kept = {key: said[key] for key in ("tool_name", "tool_call_id", "node") if isinstance(said.get(key), str)}
        message = "A tool failed." if status == _TOOL_FAILED else MESSAGES[End.UPSTREAM_ERROR]
        ids = {key: value[key] for key in ("thread_id", "run_id") if isinstance(value.get(key), str)}
        return self.line(status, message, kept, ids), status

    def note(self, said: dict[str, Any], line: bytes) -> None:
        """Log what is not told of a line, where that is asked for."""
        if self._detail == "log":
            self._told({key: _short(each) for key, each in list(said.items())[:20]} or {"line": _short(line)})

    def line(
        self, code: str, message: str, more: dict[str, str] | None = None, ids: dict[str, str] | None = None
    ) -> bytes:
        """Write an error line of our own, in the form of AgentFlow's, `reason` for those who read that."""
        data = {"status": code, **(more or {}), "code": code, "message": message, "reason": message}
        data["request_id"] = self._request_id
        return pydantic_core.to_json({"event": "error", "message": None, "state": None, "data": data, **(ids or {})})


class RawLines:
    """Lines as they came, byte for byte, but for error lines.

    Holds back nothing but the beginning of what may yet be an error line, and the rest of one, up to `most` bytes.
    """

    mark = _ERROR
    """Bytes that every error line has."""

    def __init__(self, errors: ErrorLines, most: int) -> None:
        self._errors = errors
        self._most = most
        self._held: list[bytes] = []
        self._size = 0
        self._verdict: bool | None = None
        """Whether the line that has begun is an error line; None while that cannot be told."""

    def feed(self, data: bytes) -> bytes:
        """Take in what arrived and give what can be passed on."""
        if not self._held and data.find(self.mark) < 0:  # `in` first asks whether the mark is a number
            tail = data.rfind(b"\n") + 1
            if tail == len(data):
                self._verdict = None
                return data
            if tail == 0 and self._verdict is False:
                return data
            if self._is_error(data[tail : tail + _LONGEST_HEAD]) is False:
                self._verdict = False
                return data
        parts: list[bytes] = []
        for piece in _parted(data, self.mark, begun=bool(self._held)):
            self._take(piece, parts)
        return b"".join(parts)

    def finish(self) -> bytes:
        """Give what is left at the true end."""
        return self._told() if self._verdict else b"".join(self._held)

    def _take(self, piece: bytes, parts: list[bytes]) -> None:
        """Take in a line, a part of one that no newline ends, or lines none of which is an error line."""
        if self._verdict is None:
            self._held.append(piece)
            self._size += len(piece)
            self._verdict = self._is_error(b"".join(self._held))
            if self._verdict is False or (self._verdict is None and piece.endswith(b"\n")):
                parts += self._held
                self._held, self._size = [], 0
        elif self._verdict is False:
            parts.append(piece)
        elif self._size <= self._most:
            self._held.append(piece)
            self._size += len(piece)
        elif self._errors.is_full:  # not to be held, and not to be lost
            self._errors.run_failed, self._verdict = True, False
            parts += (*self._held, piece)
            self._held, self._size = [], 0
        # Otherwise the rest is dropped: it would not be told.
        if piece.endswith(b"\n"):
            if self._verdict:
                parts.append(self._told())
            self._verdict = None

    def _told(self) -> bytes:
        line = b"".join(self._held)
        self._held, self._size = [], 0
        body = line.rstrip(b"\r\n")
        return self._safe(body) + (line[len(body) :] or b"\n")

    def _is_error(self, beginning: bytes) -> bool | None:
        """Say whether a line that begins so is an error line; None while that cannot be told."""
        head = beginning[:_LONGEST_HEAD].removeprefix(_BOM).translate(None, _BLANK)
        if head.startswith(_ERROR_HEAD):
            return self.mark in beginning  # or there are blanks inside of it
        undecided = _ERROR_HEAD.startswith(head) or _BOM.startswith(head)
        return None if undecided and len(beginning) < _LONGEST_HEAD else False

    def _safe(self, line: bytes) -> bytes:
        return self._errors.safe(line)[0]


def _parted(data: bytes, mark: bytes, *, begun: bool) -> Iterator[bytes]:
    """Part bytes into single lines that may be error lines, and whatever is between them.

    Those are the ones with the mark, the last when it is not whole, and the first when it goes on what has `begun`.
    """
    begin, whole = data.find(b"\n") + 1 or len(data) if begun else 0, data.rfind(b"\n") + 1
    if begun:
        yield data[:begin]
    while (found := data.find(mark, begin, whole)) >= 0:
        line = data.rfind(b"\n", begin, found) + 1 or begin
        if line > begin:
            yield data[begin:line]
        begin = data.find(b"\n", found) + 1
        yield data[line:begin]
    if begin < whole:
        yield data[begin:whole]
        begin = whole
    if begin < len(data):
        yield data[begin:]


class LineTooLongError(Exception):
    """A line is longer than it may be; `frames` are those of the lines before it."""

    def __init__(self, frames: bytes) -> None:
        super().__init__()
        self.frames = frames


class EventFrames:
    """Lines as server-sent events (HTML Living Standard §9.2.6): one for each line, and one that is the end."""

    def __init__(self, run: str, errors: ErrorLines, most: int) -> None:
        self._run = run.encode()
        self._errors = errors
        self._most = most
        self._number = 0
        self._begun: list[bytes] = []
        self._size = 0
        self._opened = False

    def feed(self, data: bytes) -> bytes:
        """Take in what arrived and give the frames of the lines that it completes. Raises LineTooLongError."""
        *lines, rest = data.split(b"\n")
        if lines and self._begun:
            self._begun.append(lines[0])
            self._size += len(lines[0])
            lines[0] = b"".join(self._begun)
        if lines:
            self._begun, self._size = [], 0
            if not self._opened:
                lines[0] = lines[0].removeprefix(_BOM)
                self._opened = True
        if rest:
            self._begun.append(rest)
            self._size += len(rest)
        if self._size > self._most or len(data) > self._most or (lines and len(lines[0]) > self._most):
            self._require_short(lines)
        return self._frames(lines)

    def finish(self) -> bytes:
        """Give the frame of a last line that no newline ended. To be asked only at the true end."""
        last = b"".join(self._begun)
        self._begun, self._size = [], 0
        return self._frames([last if self._opened else last.removeprefix(_BOM)])

    def end(self, end: End) -> bytes:
        """Write the one terminal event: done, stopped, or error with a code, and when to try again if that helps."""
        if end is End.DONE:
            return self._frame(b"done", b'{"end":"done"}')
        if end is End.STOPPED:
            return self._frame(b"stopped", b'{"end":"stopped"}')
        if end is End.BUDGET:
            return self._frame(b"stopped", pydantic_core.to_json({"end": end, "message": MESSAGES[end]}))
        retry = b"retry: %d\n" % RETRY_MILLISECONDS if end is End.SHUTDOWN else b""
        return retry + self._frame(b"error", self._errors.line(end, MESSAGES.get(end, "The stream ended early.")))

    def _require_short(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines):
            if len(line) > self._most:
                raise LineTooLongError(self._frames(lines[:number]))
        if self._size > self._most:
            raise LineTooLongError(self._frames(lines))

    def _frames(self, lines: Sequence[bytes]) -> bytes:
        parts: list[bytes] = []
        for each in lines:
            line = each.removesuffix(b"\r")
            if not line.strip(b" \t\r"):
                continue
            found = _NAME.match(line)
            name = found[1] if found is not None else b""
            if name == b"error":
                told, status = self._errors.safe(line)
                if status == _TOOL_FAILED:  # the run goes on: no end, so not by the name of one
                    parts.append(self._frame(status.encode(), told))
                elif told is line:
                    parts.append(self._frame(b"upstream_error", told))
            else:
                parts.append(self._frame(b"upstream_" + name if name in (b"done", b"stopped") else name, line))
        return b"".join(parts)

    def _frame(self, name: bytes, data: bytes) -> bytes:
        self._number += 1
        if b"\r" in data:  # in JSON only white space; here it would end the field
            data = b"\ndata: ".join(data.split(b"\r"))
        if name:
            return b"id: %b-%d\nevent: %b\ndata: %b\n\n" % (self._run, self._number, name, data)
        return b"id: %b-%d\ndata: %b\n\n" % (self._run, self._number, data)


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        value = pydantic_core.from_json(line.removeprefix(_BOM))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _short(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text[:_LOGGED]
