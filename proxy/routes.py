"""What a client can reach: each kind of operation is its phases, spelled out in the order they run.

Holds no policy of its own; nothing is reachable that is not a row of the operations table.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final
from urllib.parse import urlencode

from starlette.routing import Route

from proxy.admission import Limits
from proxy.agui import bind_ag_ui
from proxy.authorization import Permit, authorize
from proxy.errors import MethodNotAllowed, NotFound
from proxy.forwarding import client_query, request_upstream, stop_upstream, trail_of
from proxy.listing import Gathering, encode_listing, page_of, select
from proxy.model import (
    BODY_FOLLOWS,
    RECORD,
    App,
    Deadlines,
    Lease,
    Lifecycle,
    Principal,
    Receive,
    Record,
    Scope,
    Send,
    UpstreamRequest,
)
from proxy.negotiation import Wish, wish_of
from proxy.operations import OPERATIONS, STREAM, Kind, Operation, is_canonical
from proxy.overload import Overload
from proxy.relay import Relay, read_body
from proxy.runs import Run, Spending
from proxy.tenancy import RunRules, bind_control, bind_parameters, bind_run, tag_of
from proxy.tokens import InternalIdentity
from proxy.usage import Form, reader_for


@dataclass(frozen=True, slots=True)
class BodyRules:
    """How a request body is read: at most `most` bytes within `seconds`."""

    most: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Phases:
    """The phases of every operation, with what they need; one method for each kind of operation."""

    overload: Overload
    limits: Limits
    relay: Relay
    identity: InternalIdentity
    thread_secret: bytes
    new_name: Callable[[], str]
    run_rules: RunRules
    body_rules: BodyRules
    run_deadlines: Deadlines
    query_deadlines: Deadlines
    others: Mapping[Kind, "Phase"]
    """The phases of the kinds that have none here."""

    async def run(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:
        """Read and bind a run, then relay its answer."""
        body = await self._read(scope, receive)
        body, thread_id = bind_run(body, tag=tag, rules=self.run_rules, new_name=self.new_name)
        request = self._upstream(permit, scope, body=body, thread_id=thread_id)
        run = self._run(permit, thread_id, lease, scope, request)
        relaying = self.relay.relay(request, self.run_deadlines, lease, receive, send, run=run)
        scope["headers"].clear()
        del body, request, run  # an open stream holds nothing of its request, which is upstream
        await relaying

    async def ag_ui(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:
        """Read and bind a run in AG-UI's form, then relay its answer, which is server-sent events already."""
        body = await self._read(scope, receive)
        body, thread_id = bind_ag_ui(body, tag=tag, rules=self.run_rules, new_name=self.new_name)
        request = self._upstream(permit, scope, body=body, thread_id=thread_id)
        run = replace(self._run(permit, thread_id, lease, scope, request), wish=Wish.AG_UI)
        relaying = self.relay.relay(request, self.run_deadlines, lease, receive, send, run=run)
        scope["headers"].clear()
        del body, request, run
        await relaying

    async def control(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:
        """Read and bind what acts on a thread, then relay its answer."""
        raw = await self._read(scope, receive)
        body, thread_id = bind_control(raw, tag=tag)
        request = self._upstream(permit, scope, body=body)
        self.relay.runs.note_stop(thread_id)
        await self.relay.relay(request, self.query_deadlines, lease, receive, send)

    async def thread(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:
        """Bind the thread of the path, then relay the answer about it."""
        parameters = bind_parameters(scope["path_params"], tag)
        body = b"{}" if permit.operation.method == "DELETE" else b""  # the sidecar wants an object
        request = self._upstream(permit, scope, parameters=parameters, query=scope["query_string"], body=body)
        await self.relay.relay(request, self.query_deadlines, lease, receive, send)

    async def plain(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  one signature for all kinds
        """Relay the answer to what concerns no thread."""
        request = self._upstream(permit, scope)
        await self.relay.relay(request, self.query_deadlines, lease, receive, send)

    async def listing(self, permit: Permit, tag: str, lease: Lease, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  as above; it is released with the request
        """Gather the caller's own threads, and answer with the page of them that was asked for."""
        page = page_of(client_query(scope["query_string"], permit.operation.query))
        gathering = Gathering(tag)
        while (window := gathering.next_window()) is not None:
            request = self._upstream(permit, scope, query=urlencode(window).encode())
            status, body = await self.relay.collect(request, self.query_deadlines, receive)
            if status != 200:  # noqa: PLR2004  OK
                return await _respond(send, status, body)
            gathering.take(body)
        return await _respond(send, 200, encode_listing(gathering.answer, select(gathering.threads(), page)))

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        rules = self.body_rules
        raw = await read_body(scope["headers"], receive, most=rules.most, seconds=rules.seconds)
        record: Record = scope[RECORD]
        record.received_bytes = len(raw)
        return raw

    def _upstream(
        self,
        permit: Permit,
        scope: Scope,
        *,
        parameters: Mapping[str, str] | None = None,
        query: bytes = b"",
        body: bytes = b"",
        thread_id: str = "",
    ) -> UpstreamRequest:
        record: Record = scope[RECORD]
        return request_upstream(
            permit,
            parameters=parameters or {},
            query=query,
            headers=scope["headers"],
            body=body,
            identity=self.identity.token(permit.principal),
            request_id=record.request_id,
            traceparent=record.forward(permit.operation.method, permit.operation.upstream, thread_id),
        )

    def _run(self, permit: Permit, thread_id: str, lease: Lease, scope: Scope, request: UpstreamRequest) -> Run:
        record: Record = scope[RECORD]
        streams = permit.operation.scope == STREAM
        form: Form = "ag-ui" if permit.operation.kind is Kind.AG_UI else "stream" if streams else "answer"
        spending = Spending(reader_for(form, asked=request.body), lease, record)
        headers = trail_of(request.headers) if streams else request.headers  # a stream is open for long
        stop = partial(stop_upstream, permit, self.identity.token, thread_id, headers)
        return Run(record, thread_id, stop, wish_of(scope["headers"]) if streams else None, spending)


_RUNS: Final = frozenset({Kind.RUN, Kind.AG_UI})

type Phase = Callable[[Permit, str, Lease, Scope, Receive, Send], Awaitable[None]]


class Endpoint:
    """An ASGI endpoint for one row of the table: authorize, ask for room, charge, then the phases of its kind."""

    def __init__(self, operation: Operation, phases: Phases) -> None:
        self._operation = operation
        self._phases = phases
        kinds: Mapping[Kind, Phase] = {
            Kind.RUN: phases.run,
            Kind.AG_UI: phases.ag_ui,
            Kind.CONTROL: phases.control,
            Kind.THREAD: phases.thread,
            Kind.LISTING: phases.listing,
            Kind.PLAIN: phases.plain,
        }
        self._perform = {**kinds, **phases.others}[operation.kind]
        self._relieves = operation.kind is Kind.CONTROL  # what stops a run is welcome when there are too many
        self._runs = int(operation.kind in _RUNS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope[RECORD]
        principal: Principal | None = record.principal
        if principal is None:
            raise NotFound  # absence is refusal, though the door let nobody else through
        record.operation = self._operation.name
        trace = record.trace
        if trace is not None:
            trace.mark("authentication")
        permit = authorize(principal, self._operation)
        if trace is not None:
            trace.mark("policy")
        overload = self._phases.overload
        if not self._relieves:
            overload.require_room(principal.tier)
        secret = self._phases.thread_secret
        tag = tag_of(principal.namespace, secret)
        payer = tag_of(principal.caller, secret) if principal.caller else tag
        lease = await self._phases.limits.admit(principal, payer, self._operation)
        record.answer_fields = lease.fields
        if trace is not None:
            trace.mark("limit")
        overload.open_runs += self._runs
        try:
            await self._perform(permit, tag, lease, scope, receive, send)
        finally:
            if not record.goes_on:
                overload.open_runs -= self._runs
                lease.release()


class CanonicalPaths:
    """ASGI middleware: a path whose decoding would change its segments leads nowhere; see `is_canonical`.

    A path that is written as the table has it goes to its endpoint at once: the router, which asks one route
    after the other, would find the same one.
    """

    def __init__(self, app: App, routes: Iterable[Route]) -> None:
        self._app = app
        self._direct: dict[str, App] = {route.path: route.endpoint for route in routes if not route.param_convertors}

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        endpoint = self._direct.get(scope["path"])
        if endpoint is not None and b"%" not in scope["raw_path"]:
            return endpoint(scope, receive, send)
        if not is_canonical(scope["raw_path"], scope["path"]):
            raise NotFound
        return self._app(scope, receive, send)


class Path:
    """An ASGI endpoint for all rows of one path: the method chooses, and HEAD is not GET."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._endpoints = endpoints
        self._allowed = ", ".join(sorted(endpoints))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        endpoint = self._endpoints.get(scope["method"])
        if endpoint is None:
            raise MethodNotAllowed(self._allowed)
        return endpoint(scope, receive, send)


def routes(phases: Phases) -> list[Route]:
    """Give one route for each path of the operations table."""
    paths: dict[str, dict[str, Endpoint]] = {}
    for row in OPERATIONS:
        paths.setdefault(row.path, {})[row.method] = Endpoint(row, phases)
    return [Route(path, Path(endpoints), include_in_schema=False) for path, endpoints in paths.items()]


class Live:
    """An ASGI endpoint: this process runs."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI
        await _respond(send, 200, b'{"status":"live"}')


class Ready:
    """An ASGI endpoint: this process takes new work, or 503 while it drains or `lacks` names what is missing."""

    def __init__(self, lifecycle: Lifecycle, *, lacks: Callable[[], str]) -> None:
        self._lifecycle = lifecycle
        self._lacks = lacks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI
        if not self._lifecycle.ready:
            await _respond(send, 503, b'{"status":"draining"}')
        elif lack := self._lacks():
            await _respond(send, 503, b'{"status":"%b"}' % lack.encode())
        else:
            await _respond(send, 200, b'{"status":"ready"}')


def health_routes(live: Live, ready: Ready) -> list[Route]:
    """Give the routes that need no credential and are never limited."""
    return [
        Route("/health/live", live, methods=["GET"], include_in_schema=False),
        Route("/health/ready", ready, methods=["GET"], include_in_schema=False),
    ]


async def _respond(send: Send, status: int, body: bytes) -> None:
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    head.append((b"cache-control", b"no-store"))
    await send({"type": "http.response.start", "status": status, "headers": head, BODY_FOLLOWS: True})
    await send({"type": "http.response.body", "body": body, "more_body": False})
