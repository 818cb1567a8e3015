"""The allow-list: every operation a caller can reach, as one table, and the routes that are not exposed.

Pure values; what is not a row here does not exist.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """How an operation's request is bound to its caller, and how its answer flows."""

    RUN = "run"
    """A body with messages; thread id in `config`; the answer is relayed."""
    AG_UI = "ag-ui"
    """A run in AG-UI's own form, `threadId` at its top; the answer is relayed."""
    CONTROL = "control"
    """A body with a thread id at its top; the answer is relayed."""
    THREAD = "thread"
    """No body of the caller's; thread id in the path; the answer is relayed."""
    DUPLEX = "duplex"
    """A WebSocket; each message of the client's is a run, bound like a run's body."""
    LISTING = "listing"
    """The caller's own threads, filtered here."""
    UPLOAD = "upload"
    """A form with a file, passed on as it comes; the answer tells the file's handle."""
    FILE = "file"
    """No body; the handle of a file in the path; the answer is relayed."""
    FILE_FACTS = "file-facts"
    """The same; the answer tells the handle again."""
    PLAIN = "plain"
    """No thread at all."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of the allow-list. `upstream` may name the parameters of `path`; `cost` is in requests."""

    name: str
    method: str
    path: str
    upstream: str
    scope: str
    kind: Kind
    summary: str
    query: frozenset[str] = frozenset()
    cost: int = 1


INVOKE: Final = "agent:invoke"
STREAM: Final = "agent:stream"
STOP: Final = "agent:stop"
READ: Final = "threads:read"
DELETE: Final = "threads:delete"
PING: Final = "agent:ping"
FILES_READ: Final = "files:read"
FILES_WRITE: Final = "files:write"

IMPERSONATE: Final = "agent:impersonate"
"""Of no operation: lets a service act for its users (X-On-Behalf-Of)."""

USUAL_SCOPES: Final = frozenset({INVOKE, STREAM, STOP, READ, DELETE, PING, FILES_READ, FILES_WRITE})
"""What a credential gets that nobody chose scopes for."""
SCOPES: Final = USUAL_SCOPES | {IMPERSONATE}
PAGING: Final = frozenset({"search", "offset", "limit"})

_V1: Final = "/v1/graph"
_FILE: Final = "/v1/files/{file_id}"
_THREAD: Final = "/v1/threads/{thread_id}"

OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation("invoke", "POST", "/agent/invoke", f"{_V1}/invoke", INVOKE, Kind.RUN, "Run the agent, answer whole"),
    Operation("stream", "POST", "/agent/stream", f"{_V1}/stream", STREAM, Kind.RUN, "Run the agent, answer as it comes"),
    Operation("invoke", "POST", f"/agent{_V1}/invoke", f"{_V1}/invoke", INVOKE, Kind.RUN, "The sidecar's own path of invoke"),
    Operation("stream", "POST", f"/agent{_V1}/stream", f"{_V1}/stream", STREAM, Kind.RUN, "The sidecar's own path of stream"),
    Operation("ag-ui", "POST", "/agent/v1/ag-ui", "/v1/ag-ui", STREAM, Kind.AG_UI, "Run the agent over AG-UI, answer as it comes"),
    Operation("ws", "GET", f"/agent{_V1}/ws", f"{_V1}/ws", STREAM, Kind.DUPLEX, "Run the agent over a WebSocket"),
    Operation("stop", "POST", f"/agent{_V1}/stop", f"{_V1}/stop", STOP, Kind.CONTROL, "Stop a thread's run"),
    Operation("threads.list", "GET", "/agent/v1/threads", "/v1/threads", READ, Kind.LISTING, "List one's threads", PAGING),
    Operation("threads.get", "GET", f"/agent{_THREAD}", _THREAD, READ, Kind.THREAD, "Read a thread"),
    Operation("threads.delete", "DELETE", f"/agent{_THREAD}", _THREAD, DELETE, Kind.THREAD, "Delete a thread"),
    Operation("threads.state", "GET", f"/agent{_THREAD}/state", f"{_THREAD}/state", READ, Kind.THREAD, "Read a thread's state"),
    Operation("threads.messages", "GET", f"/agent{_THREAD}/messages", f"{_THREAD}/messages", READ, Kind.THREAD,
              "Read a thread's messages", PAGING),
    Operation("threads.message", "GET", f"/agent{_THREAD}/messages/{{message_id}}", f"{_THREAD}/messages/{{message_id}}",
              READ, Kind.THREAD, "Read one message"),
    Operation("files.upload", "POST", "/agent/v1/files/upload", "/v1/files/upload", FILES_WRITE, Kind.UPLOAD, "Upload a file"),
    Operation("files.get", "GET", f"/agent{_FILE}", _FILE, FILES_READ, Kind.FILE, "Read one's file"),
    Operation("files.info", "GET", f"/agent{_FILE}/info", f"{_FILE}/info", FILES_READ, Kind.FILE_FACTS, "Read a file's facts"),
    Operation("files.url", "GET", f"/agent{_FILE}/url", f"{_FILE}/url", FILES_READ, Kind.FILE_FACTS, "Read where a file is had"),
    Operation("ping", "GET", "/agent/ping", "/ping", PING, Kind.PLAIN, "Ask the sidecar for a sign of life"),
)  # fmt: skip

NOT_EXPOSED: Final[dict[tuple[str, str], str]] = {
    ("POST", "/v1/graph/fix"): "rewrites history; an operator's tool",
    ("GET", "/v1/graph"): "describes the graph's inside",
    ("GET", "/v1/graph/tools"): "describes the graph's inside",
    ("GET", "/v1/graph:StateSchema"): "describes the graph's inside",
    ("GET", "/v1/observability/{thread_id}"): "traces hold prompts, and its own check lets others read them",
    ("PUT", "/v1/threads/{thread_id}/state"): "forges history",
    ("DELETE", "/v1/threads/{thread_id}/state"): "forges history",
    ("POST", "/v1/threads/{thread_id}/messages"): "forges history",
    ("DELETE", "/v1/threads/{thread_id}/messages/{message_id}"): "forges history",
}
"""The sidecar's other routes by method and path, each with the reason it has no row. Families follow."""

NOT_EXPOSED_PREFIXES: Final[dict[str, str]] = {
    "/v1/graph/live": "audio both ways, whose frames name nothing that could be bound or counted",
    "/v1/store": "memories are shared between users of one deployment",
    "/v1/config": "describes the deployment",
    "/v1/evals": "an operator's tool",
}


def is_canonical(raw_path: bytes, path: str) -> bool:
    """Say whether a path is written the one way we accept: no coded slash, dot segment or empty segment.

    A parameter may be percent-encoded; what is decoded must not change how many segments there are.
    """
    if b"%" in raw_path and raw_path.count(b"/") != path.count("/"):
        return False
    if not path.isprintable():  # a regular expression's end matches before a line break, for one
        return False
    return not any(segment in ("", ".", "..") for segment in path.split("/")[1:])
