"""The values that travel along a request, and the Protocols of what they meet.

Nothing here decides, acts or imports a library; every other room may import this one.
"""

import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple, Protocol

from proxy.ends import End

# ASGI 3.0 (asgi.readthedocs.io); values are open by specification.
type Scope = MutableMapping[str, Any]
type Message = MutableMapping[str, Any]
type Receive = Callable[[], Awaitable[Message]]
type Send = Callable[[Message], Awaitable[None]]
type App = Callable[[Scope, Receive, Send], Awaitable[None]]

type Headers = list[tuple[bytes, bytes]]
"""Raw header fields: lower-case names, order and duplicates kept."""


class Inbox:
    """An ASGI `receive` whose server tells more than ASGI has words for (see `protocol`).

    Whoever finds one needs no timer to read a body that is here, and no task to wait for its client's leaving.
    """

    __slots__ = ()

    def __call__(self) -> Awaitable[Message]:
        """Receive, as ASGI says."""
        raise NotImplementedError

    def take_body(self) -> bytes | None:
        """Give the whole body if it has come; None: it must be received, or was."""
        raise NotImplementedError

    def on_leave(self, left: Callable[[], None] | None) -> None:
        """Have `left` called, once, when the client leaves, or soon where it has left; None: nobody any more."""
        raise NotImplementedError

    @property
    def is_writable(self) -> bool:
        """Whether `send` would return at once."""
        raise NotImplementedError


class CredentialKind(StrEnum):
    """How a caller proved who he is."""

    JWT = "jwt"
    API_KEY = "api_key"


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller whose credential was proven.

    `namespace` owns threads and is unique across kinds and issuers; `name` is what the access line shows.
    `caller` is who is charged where that is not the namespace: a tenant's member, or who acts `on_behalf_of` a user.
    `tenant` is the tenant's namespace, empty without one.
    `key_id` is the API key's, empty for a token; `rate` replaces the deployment's own, in its notation.
    """

    subject: str
    name: str
    namespace: str
    scopes: frozenset[str]
    kind: CredentialKind
    tier: str = "default"
    rate: str | None = None
    key_id: str = ""
    caller: str = ""
    tenant: str = ""
    on_behalf_of: str | None = None

    @property
    def partition(self) -> str:
        """Who this principal's quotas belong to."""
        return self.caller or self.namespace


class Usage(NamedTuple):
    """Model tokens that a run has used so far; `estimated` when any of them was told from bytes, not reported."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    estimated: bool


class Trace(Protocol):
    """Where a traced request leaves its marks."""

    def mark(self, name: str) -> None:
        """End the phase `name` now; it began with the mark before this one, or with the request."""

    def forward(self, attributes: Mapping[str, str | int]) -> bytes:
        """Begin a request to the sidecar; give the traceparent it is told (W3C Trace Context)."""


@dataclass(slots=True)
class Record:
    """What is known of one request so far; filled along its way, written as the access line at its end.

    Times are in seconds of a monotonic clock; `answer_fields` are added to whatever answer goes out. While the
    run `goes_on` upstream without its client, its lease is held, and `usage` and `turns` may still grow. Without a
    method it was no request.
    """

    request_id: bytes
    started: float
    address: str
    method: str = ""
    path: str = ""
    principal: Principal | None = None
    operation: str = ""
    status: int = 0
    sent_bytes: int = 0
    first_byte_at: float | None = None
    end: End = End.DONE
    code: str = ""
    reason: str = ""
    fault: str = ""
    answer_fields: Headers = field(default_factory=list)
    usage: Usage | None = None
    turns: int = 0
    """Whole messages of the assistant in the answer."""
    goes_on: bool = False
    received_bytes: int = 0
    forwarded: bool = False
    """Whether the request was written for the sidecar; without it nothing ran."""
    running: int = 0
    """On a WebSocket: runs that have begun and not ended."""
    run_ends: dict[End, int] | None = None
    """On a WebSocket: how its runs ended, and how many so. `usage` and `turns` are then those of all of them."""
    trace: Trace | None = None
    """Set while the request is traced."""

    def forward(self, method: str, template: str, thread_id: str = "") -> bytes | None:
        """Note that the request is written for the sidecar; give its traceparent there, if it is traced.

        The client's span begins, in OpenTelemetry's words; a run has a thread.
        """
        self.forwarded = True
        if self.trace is None:
            return None
        told: dict[str, str | int] = {"http.request.method": method, "url.template": template}
        if thread_id:
            told |= {"gen_ai.operation.name": "invoke_agent", "gen_ai.conversation.id": thread_id}
        return self.trace.forward(told)


class Watcher(Protocol):
    """Sees every request begin and end: the access line, the metrics, the traces. Never raises, never waits."""

    def begin(self, record: Record, headers: Headers) -> None:
        """Take in that a request has begun, with its header fields."""

    def end(self, record: Record, now: float) -> None:
        """Take in that it has ended `now`, in the seconds of the record's own clock."""


RECORD: Final = "agentflow_proxy.record"
"""The key of a request's Record in its ASGI scope."""
REPROVE: Final = "agentflow_proxy.reprove"
"""The key, in a WebSocket's ASGI scope, of a coroutine function that proves its credential again."""
BODY_FOLLOWS: Final = "agentflow_proxy.body_follows"
"""A key of the message that begins an answer: its body, or some of it, is sent next, with nothing awaited between."""
DRAIN: Final = "agentflow_proxy.drain"
"""The type of the message, in a WebSocket's ASGI channel, that says the process is to end."""


LAST_SECONDS: Final = 2.4
"""For a process to take in who had connected and to tell what it must, beside the grace; then it is gone in 0.6 s."""


@dataclass(slots=True)
class Lifecycle:
    """Whether this process wants new work (`ready`), and whether it refuses it (`draining`)."""

    ready: bool = True
    draining: bool = False
    ends_at: float = math.inf
    """When nothing is waited for any more, by the event loop's clock."""

    def left(self, now: float) -> float:
        """Give the seconds that the end may still take; all its parts have only these."""
        return min(LAST_SECONDS, max(0.0, self.ends_at - now))


class UpstreamRequest(NamedTuple):
    """A request as the sidecar will see it. `target` is the path with its query, percent-encoded."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long upstream may take, in seconds: to accept, to begin its answer, between bytes, in all."""

    connect: float
    first_byte: float
    idle: float
    total: float


type ErrorDetail = Literal["safe", "log", "full"]
"""What a client gets of an error line: a safe form; that, and a log line of the rest; the line itself."""


@dataclass(frozen=True, slots=True)
class FlowRules:
    """How answers flow; see `flowsettings`. Times are in seconds."""

    heartbeat: float
    max_line: int
    error_detail: ErrorDetail
    stop_on_disconnect: bool
    stop_over_budget: bool


class Outlet(Protocol):
    """Where the bytes of an answer may go as they arrive, in the event loop's own callback."""

    @property
    def is_open(self) -> bool:
        """Whether bytes can be passed on now, without waiting for anybody."""

    def pass_on(self, data: bytes) -> None:
        """Pass on bytes, while it is open. What it raises ends the exchange, and is raised by its `read`."""


class Exchange(Protocol):
    """One answer from upstream, its body still coming."""

    @property
    def status(self) -> int:
        """The final status code, 200 to 599."""

    @property
    def headers(self) -> Headers:
        """The head's fields, names in lower case; whoever has passed them on may empty the list."""

    @property
    def has_body(self) -> bool:
        """Whether `read` would not wait: some of the body has come, or its end."""

    @property
    def ended(self) -> bool:
        """Whether the last byte has been read: the answer is whole."""

    @property
    def active(self) -> float:
        """When something last came from upstream, or was read here; by the event loop's clock."""

    async def head(self) -> bool:
        """Wait until status and headers are known; False when `nudge` came first."""

    async def read(self, outlet: Outlet | None = None) -> bytes:
        """Give the bytes that have arrived, at least one, or `b""` at the true end; then `ended` holds.

        What arrives while it waits, and is not the end, may go to the `outlet` instead: no task need be woken for it.
        `b""` before the end: `nudge` was called. Raises an upstream Problem when the answer was cut, broke the
        framing or missed a deadline. To cancel it changes nothing.
        """

    def nudge(self) -> None:
        """Let a waiting `head` or `read` return with nothing; does nothing when none waits."""

    def abandon(self) -> None:
        """Close upstream at once; a waiting `read` raises ClientLeft. Does nothing once the exchange has ended."""


class Upstream(Protocol):
    """Where requests are forwarded to."""

    async def start(self, request: UpstreamRequest, deadlines: Deadlines) -> Exchange:
        """Send `request`, and wait for nothing more; the exchange must be read to its end or abandoned."""


class Lease(Protocol):
    """A request's admission, and the slots it holds until its run upstream has ended."""

    fields: Headers
    """The RateLimit fields of the answer."""

    def charge(self, tokens: int, *, estimated: bool) -> bool:
        """Charge model tokens that were used; give whether the budgets still have some left."""

    def release(self) -> None:
        """Free the slots: the run upstream has ended. Asked again, nothing; never blocks."""
