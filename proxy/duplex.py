"""A WebSocket's two ends: what the client says goes up, bound, message by message; what the sidecar says comes down.

Each end has its own connection and answers its own pings; close codes cross, and neither end outlives the other.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import Close
from websockets.uri import parse_uri

from proxy.admission import Limits
from proxy.authorization import Permit, authorize
from proxy.conversation import GOING_AWAY, IDLE, Conversation, Turn, code_of
from proxy.credentials import BEARER_SUBPROTOCOL
from proxy.ends import End
from proxy.errors import ClientLeft, ClientProblem, CredentialInvalid, Problem, UpgradeRequired
from proxy.forwarding import request_upstream, stop_upstream
from proxy.frames import bind_frame
from proxy.framing import ErrorLines
from proxy.model import RECORD, REPROVE, FlowRules, Lease, Principal, Receive, Record, Scope, Send, UpstreamRequest
from proxy.operations import Kind
from proxy.origin import Origin
from proxy.outages import (
    Draining,
    RunDeadline,
    Unavailable,
    UpstreamDeadline,
    UpstreamDistrust,
    UpstreamMalformed,
    UpstreamProblem,
)
from proxy.overload import Overload
from proxy.places import Places
from proxy.routes import Phase
from proxy.runs import Runs, log
from proxy.tenancy import RunRules, tag_of
from proxy.tokens import InternalIdentity

MAX_MESSAGE_BYTES: Final = 16 << 20
"""The largest message of the sidecar's."""
_LAST_WORDS_SECONDS: Final = 1.0
_UNAUTHORIZED: Final = 401
_POLICY: Final = 1008
_FAILED: Final = 1011
_RESTARTING: Final = 1012
_TRY_LATER: Final = 1013
_BAD_GATEWAY: Final = 1014


@dataclass(frozen=True, slots=True)
class DuplexRules:
    """How long, in seconds: `handshake` is for the sidecar to accept, `idle` between messages."""

    connect: float
    handshake: float
    idle: float
    total: float


@dataclass(slots=True)
class Duplex:
    """Relays WebSockets to the sidecar at `url`."""

    url: str
    rules: DuplexRules
    identity: InternalIdentity
    limits: Limits
    runs: Runs
    overload: Overload
    places: Places
    run_rules: RunRules
    flow_rules: FlowRules
    thread_secret: bytes
    new_name: Callable[[], str]

    def phases(self) -> Mapping[Kind, Phase]:
        """Give the phase of the one kind that is a WebSocket."""
        return {Kind.DUPLEX: self.converse}

    async def converse(
        self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Reach the sidecar, accept the client, then carry what they say until either closes.

        Raises a Problem, before the client is accepted for an answer to its handshake, afterwards for the record.
        """
        if scope["type"] != "websocket":
            raise UpgradeRequired
        with self.places.one(permit.principal.partition):
            request = self._request(permit, scope)
            async with self._connected(request) as upstream:
                await receive()  # websocket.connect
                offers = BEARER_SUBPROTOCOL.decode() in scope["subprotocols"][:1]
                await _accept(send, BEARER_SUBPROTOCOL.decode() if offers else None)
                lease.release()  # a run takes a slot, a connection alone does not
                await self._carry(permit, tag, scope, request, upstream, receive, send)

    async def _carry(
        self,
        permit: Permit,
        tag: str,
        scope: Scope,
        request: UpstreamRequest,
        upstream: ClientConnection,
        receive: Receive,
        send: Send,
    ) -> None:
        payer = tag_of(permit.principal.caller, self.thread_secret) if permit.principal.caller else tag
        record: Record = scope[RECORD]

        async def admit(raw: bytes) -> tuple[bytes, Turn]:
            await _require_same(permit, scope[REPROVE])
            self.overload.require_room(permit.principal.tier)
            lease = await self.limits.admit(permit.principal, payer, permit.operation)
            try:
                bound, thread_id = bind_frame(raw, tag=tag, rules=self.run_rules, new_name=self.new_name)
            except BaseException:
                lease.release()
                raise
            stop = partial(stop_upstream, permit, self.identity.token, thread_id, request.headers)
            return bound, Turn(lease, record, self.runs, self.overload, thread_id=thread_id, stop=stop)

        rules, request_id = self.flow_rules, record.request_id.decode()

        def tell(said: dict[str, Any]) -> None:
            log.warning("run.failed", extra={"fields": {"request_id": request_id, "said": said}})

        errors = ErrorLines(request_id, rules.error_detail, tell)
        talk = Conversation(upstream, receive, send, admit, rules.stop_over_budget, errors, request_id)
        try:
            close = await talk.until_closed(idle=self.rules.idle, total=self.rules.total)
        except ClientLeft:
            raise
        except Problem as problem:
            await _close(send, Close(_code_of(problem), problem.code))
            raise
        except asyncio.CancelledError:  # the grace is over
            await _close(send, Close(_RESTARTING, "draining"))
            raise
        if close.code == GOING_AWAY and close.reason == IDLE:
            record.end = End.IDLE_DEADLINE
        await _close(send, close)

    def _request(self, permit: Permit, scope: Scope) -> UpstreamRequest:
        record: Record = scope[RECORD]
        # The sidecar looks at the token again before each run, so it must live as long as the conversation may.
        return request_upstream(
            permit,
            parameters={},
            query=b"",
            headers=scope["headers"],
            body=b"",
            identity=self.identity.long_token(permit.principal, self.rules.total),
            request_id=record.request_id,
            traceparent=record.forward(permit.operation.method, permit.operation.upstream),
        )

    @asynccontextmanager
    async def _connected(self, request: UpstreamRequest) -> AsyncGenerator[ClientConnection]:
        """Open a WebSocket upstream; never by way of a proxy, and never where an answer might redirect to."""
        origin = Origin.of(self.url)
        protocol = ClientProtocol(
            parse_uri(f"ws://{origin.authority}{request.target.decode()}"), max_size=MAX_MESSAGE_BYTES
        )
        fields = [(name.decode(), value.decode("latin-1")) for name, value in request.headers]
        try:
            async with asyncio.timeout(self.rules.connect):
                _, upstream = await origin.connect(
                    # While a run goes on the sidecar may read nothing, and a ping would be left unanswered.
                    lambda: ClientConnection(protocol, ping_interval=None, close_timeout=1)
                )
        except TimeoutError as error:
            raise UpstreamDeadline(reason="connect") from error
        except OSError as error:
            raise UpstreamProblem(reason=type(error).__name__) from error
        try:
            async with asyncio.timeout(self.rules.handshake):
                await upstream.handshake(fields, None)
            yield upstream
        except TimeoutError as error:
            raise UpstreamDeadline(reason="handshake") from error
        except InvalidStatus as error:
            status = error.response.status_code
            problem = UpstreamDistrust if status == _UNAUTHORIZED else UpstreamProblem
            raise problem(reason=f"handshake {status}") from error
        except InvalidHandshake as error:
            raise UpstreamMalformed(reason=type(error).__name__) from error
        finally:
            upstream.transport.abort()


async def _require_same(permit: Permit, reprove: Callable[[], Awaitable[Principal]]) -> None:
    """Prove the credential again: it may have expired, been revoked or lost a scope since the last run."""
    principal = await reprove()
    authorize(principal, permit.operation)
    if principal.namespace != permit.principal.namespace:
        raise CredentialInvalid(reason="another principal")


async def _accept(send: Send, subprotocol: str | None) -> None:
    try:
        await send({"type": "websocket.accept", "subprotocol": subprotocol})
    except OSError as error:  # what uvicorn raises when the client is gone
        raise ClientLeft from error


async def _close(send: Send, close: Close) -> None:
    # Gone already, or it does not read, which is not waited for.
    with contextlib.suppress(OSError, RuntimeError, TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_SECONDS):
            await send({"type": "websocket.close", "code": code_of(close), "reason": close.reason})


def _code_of(problem: Problem) -> int:
    """Choose the close code that tells of a problem."""
    if isinstance(problem, Draining):
        return _RESTARTING
    if isinstance(problem, RunDeadline):
        return GOING_AWAY
    if isinstance(problem, UpstreamProblem):
        return _BAD_GATEWAY
    if isinstance(problem, Unavailable):
        return _TRY_LATER
    return _POLICY if isinstance(problem, ClientProblem) else _FAILED
