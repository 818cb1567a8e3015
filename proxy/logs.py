"""Writing lines: JSON for machines, readable ones for a terminal; a log that cannot be written stops nothing.

Lines are handed to a thread, which writes them; what the reader of a full pipe leaves no room for is counted and lost.
"""

import json
import logging
import os
import re
import select
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii
from logging.handlers import QueueHandler
from pathlib import Path
from queue import Full, Queue
from typing import Final, Literal, TextIO, override

MOST_WAITING: Final = 10_000
"""Lines that wait for the thread; a line has about 400 bytes, and never many more than 2,000."""
_GATHER_SECONDS: Final = 0.02
_LONGEST_WRITE: Final = 4096
"""As much as a pipe takes whole (PIPE_BUF), so that the lines of several processes do not mix."""
_EXPECTED: Final = (
    "ASGI callable returned without completing response.",
    "ASGI callable returned without completing handshake.",
    "Exception in ASGI application\n",
)
_BARE: Final = re.compile(r"[!#-<>-~]+")
_COLOURS: Final = {"debug": "2", "info": "0", "warning": "33", "error": "31", "critical": "31"}
_STATUS_COLOURS: Final = {2: "32", 3: "36", 4: "33", 5: "31"}


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own. `write` never waits and never raises."""

    def __init__(self, descriptor: int, *, most: int = MOST_WAITING) -> None:
        self._descriptor = descriptor
        self._most = most
        self.dropped = 0
        """Lines lost: there was no room to keep them, or the write failed."""
        self._told = 0
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lines: list[bytes] = []
        self._wake = threading.Event()
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Take a line that ends with a newline."""
        lines = self._lines
        if len(lines) >= self._most:
            self.dropped += 1
            return
        lines.append(line)
        if len(lines) == 1:  # else the thread is awake, and looks again before it sleeps
            self._wake.set()

    def flush(self, seconds: float) -> None:
        """Wait until everything is written, for so long at most."""
        until = time.monotonic() + seconds
        while (self._lines or self._busy) and time.monotonic() < until:
            time.sleep(0.002)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._busy = True
            self._wake.clear()
            time.sleep(_GATHER_SECONDS)
            while self._lines:
                batch = self._lines[:1000]
                del self._lines[:1000]
                self._write_all(batch)
            self._busy = False

    def _write_all(self, lines: list[bytes]) -> None:
        if self.dropped > self._told:
            told = self.dropped
            lines.append(encode_line("warning", "log.lines_dropped", {"lines": told - self._told}))
            self._told = told
        start, size = 0, 0
        for end, line in enumerate(lines):
            if size + len(line) > _LONGEST_WRITE and end > start:
                self._write(lines[start:end])
                start, size = end, 0
            size += len(line)
        self._write(lines[start:])

    def _write(self, lines: list[bytes]) -> None:
        rest = b"".join(lines)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [], 1)
            except OSError:  # a full disk, a closed pipe
                self.dropped += len(lines)
                return


class LineHandler(logging.Handler):
    """Where every logger's lines go. The access line comes straight to `write`, past the rest of `logging`."""

    def __init__(self, writer: LineWriter, *, style: Callable[[str], str] | None = None) -> None:
        super().__init__()
        self.writer = writer
        self._style = style
        self.setFormatter(JsonFormatter())

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(self.format(record))
        except Exception:  # noqa: BLE001  as in logging's own handlers: what cannot be told is passed over
            self.handleError(record)

    def write(self, line: str) -> None:
        """Write a line of JSON, without its end, in the style of this handler."""
        if self._style is not None:
            line = self._style(line)
        self.writer.write(line.encode("ascii", "backslashreplace") + b"\n")

    @override
    def flush(self) -> None:  # which `logging` calls at the process's end
        self.writer.flush(1.0)


class BackgroundHandler(QueueHandler):
    """Hands records to another handler from a thread of its own: a disk that hangs stops nobody."""

    queue: "Queue[logging.LogRecord]"

    def __init__(self, handler: logging.Handler, *, most: int = MOST_WAITING) -> None:
        super().__init__(Queue(most))
        self.dropped = 0
        """Records lost, since there was no room to keep them."""
        self._handler = handler
        threading.Thread(target=self._run, name="audit", daemon=True).start()

    @override
    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except Full:
            self.dropped += 1

    @override
    def flush(self) -> None:
        """Wait until everything is written, for a second at most."""
        until = time.monotonic() + 1
        while self.queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.002)

    def _run(self) -> None:
        while True:
            record = self.queue.get()
            self._handler.handle(record)
            self.queue.task_done()


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, and the record's fields."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {}
        if record.exc_info is not None and record.exc_info[1] is not None:
            fields["error"] = place_of(record.exc_info[1])
        fields |= getattr(record, "fields", {})
        return _json(record.levelname.lower(), record.getMessage(), fields, record.created)


def encode_line(level: str, event: str, fields: Mapping[str, object]) -> bytes:
    """Give a whole line of now."""
    return _json(level, event, fields, time.time()).encode() + b"\n"


def _json(level: str, event: str, fields: Mapping[str, object], created: float) -> str:
    at = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
    line = {"time": at, "level": level, "event": event, **fields}
    return without_delete(json.dumps(line, separators=(",", ":")))


def without_delete(text: str) -> str:
    """Escape the one control character that JSON leaves as it is."""
    return text.replace("\x7f", "\\u007f") if "\x7f" in text else text


def make_readable(line: str, *, colours: bool) -> str:
    """Write a line of JSON for people; what could steer a terminal stays escaped."""
    fields = json.loads(line)
    at, level, event = str(fields.pop("time"))[11:23], str(fields.pop("level")), str(fields.pop("event"))

    def paint(text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colours else text

    said = [paint(at, "2"), paint(f"{level:<7}", _COLOURS.get(level, "0"))]
    if event == "request.finished":
        status = int(fields.pop("status"))
        said += [paint(f"{status:03}", _STATUS_COLOURS.get(status // 100, "0"))]
        said += [_plain(fields.pop(name)) for name in ("method", "path")]
        said += [f"{fields.pop('duration_ms'):.1f} ms"]
    else:
        said.append(_plain(event))
    said += [paint(f"{name}=", "2") + _plain(value) for name, value in fields.items() if value not in (None, "")]
    return " ".join(said)


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else without_delete(encode_basestring_ascii(value))
    return "-" if value is None else without_delete(json.dumps(value))


def configure_logging(level: str, stream: TextIO, style: Literal["json", "text", "auto"] = "json") -> LineHandler:
    """Send every logger's lines to `stream`, from `level` up; `auto` is text for a terminal and JSON for the rest."""
    is_terminal = stream.isatty()
    readable = style == "text" or (style == "auto" and is_terminal)
    colours = is_terminal and "NO_COLOR" not in os.environ
    writer = LineWriter(stream.fileno())
    handler = LineHandler(writer, style=(lambda line: make_readable(line, colours=colours)) if readable else None)
    logging.raiseExceptions = False  # a log that cannot be written stops nothing
    # What no line shows need not be looked up for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers = [handler]
    set_level(level)
    # A cut answer is left cut on purpose; its access line says why.
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.msg not in _EXPECTED)
    return handler


def log_plainly(level: str, stream: TextIO) -> None:
    """Send every logger's lines to `stream`, without a thread: for a process that forks, and has little to say."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.getLogger().handlers = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """Log from `level` up from now on."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    # Further down, `websockets` tells headers and what is said.
    for noisy in ("uvicorn.error", "opentelemetry", "urllib3", "websockets"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def lines_dropped() -> int:
    """Give how many lines this process has lost, those of the audit log included."""
    handlers = [*logging.getLogger().handlers, *logging.getLogger("agentflow_proxy.audit").handlers]
    lost = sum(handler.writer.dropped for handler in handlers if isinstance(handler, LineHandler))
    return lost + sum(handler.dropped for handler in handlers if isinstance(handler, BackgroundHandler))


def place_of(error: BaseException) -> str:
    """Give the error's type and where it was raised: its text may hold what a caller sent, so it is not logged."""
    frame = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    where = f" at {Path(frame.filename).name}:{frame.lineno} in {frame.name}" if frame is not None else ""
    return type(error).__name__ + where
