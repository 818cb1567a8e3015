"""Traces by OpenTelemetry: the spans of a sampled request are made when it has ended, and sent from a thread.

Holds no prompt, no credential and no caller's name. Imported only where traces are asked for.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from proxy.accesslog import shortened
from proxy.model import Headers, Record
from proxy.settings import Settings

_TRACEPARENT: Final = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def parent_of(headers: Headers) -> tuple[int, int, bool] | None:
    """Read the caller's traceparent (W3C Trace Context): trace, parent span, whether sampled; None without it."""
    values = [value for name, value in headers if name == b"traceparent"]
    found = _TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    if found is None:
        return None
    trace, span, flags = (int(part, 16) for part in found.groups())
    return (trace, span, bool(flags & 1)) if trace and span else None


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase that ended at `at`, or began then when it is a request to the sidecar, which has a `span` of its own."""

    name: str
    at: float
    attributes: Mapping[str, str | int]
    span: int = 0


class RequestTrace:
    """What is noted of one sampled request. Implements `model.Trace`. `fresh` gives so many random bits."""

    __slots__ = ("_clock", "_fresh", "parent", "phases", "server", "trace")

    def __init__(
        self, clock: Callable[[], float], parent: tuple[int, int, bool] | None, *, fresh: Callable[[int], int]
    ) -> None:
        self._clock = clock
        self._fresh = fresh
        self.trace = parent[0] if parent is not None else fresh(128) or 1
        self.parent = parent[1] if parent is not None else None
        self.server = fresh(64) or 1
        self.phases: list[_Phase] = []

    def mark(self, name: str) -> None:
        """See `model.Trace.mark`."""
        self.phases.append(_Phase(name, self._clock(), {}))

    def forward(self, attributes: Mapping[str, str | int]) -> bytes:
        """See `model.Trace.forward`."""
        span = self._fresh(64) or 1
        self.phases.append(_Phase("", self._clock(), attributes, span))
        return b"00-%032x-%016x-01" % (self.trace, span)


class Tracer:
    """Decides what is traced, and makes the spans. Implements `model.Watcher`.

    A caller's traceparent gives the trace its id. Whether it is sampled is decided here, by `ratio`, since anybody can
    ask for anything; with `follow_caller` the caller's own flag decides. `clock` is the records', `wall` gives Unix
    seconds.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        *,
        ratio: float,
        follow_caller: bool,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._processor = processor
        self._ratio = ratio
        self._follow = follow_caller
        self._clock = clock
        self._wall = wall
        self._rolls = random.Random()  # noqa: S311  ids are no secrets
        version = metadata.version("agentflow-proxy")
        self._resource = Resource.create({"service.name": "agentflow-proxy", "service.version": version})
        self._scope = InstrumentationScope("agentflow_proxy", version)

    def begin(self, record: Record, headers: Headers) -> None:
        """See `model.Watcher`."""
        parent = parent_of(headers)
        wanted = parent[2] if parent is not None and self._follow else self._rolls.random() < self._ratio
        if wanted and record.method:
            record.trace = RequestTrace(self._clock, parent, fresh=self._rolls.getrandbits)

    def end(self, record: Record, now: float) -> None:
        """See `model.Watcher`."""
        trace = record.trace
        if not isinstance(trace, RequestTrace):
            return
        offset = self._wall() - now

        def send(
            name: str,
            kind: SpanKind,
            ids: tuple[int, int | None],
            *,
            begun: float,
            ended: float,
            attributes: Mapping[str, str | int | float],
            failure: str = "",
        ) -> None:
            span, parent = ids
            context = SpanContext(trace.trace, span, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
            above = SpanContext(trace.trace, parent, is_remote=span == trace.server) if parent is not None else None
            self._processor.on_end(
                ReadableSpan(
                    name,
                    context,
                    parent=above,
                    resource=self._resource,
                    attributes=dict(attributes),
                    kind=kind,
                    status=Status(StatusCode.ERROR, failure) if failure else Status(),
                    start_time=int((begun + offset) * 1e9),
                    end_time=int((ended + offset) * 1e9),
                    instrumentation_scope=self._scope,
                )
            )

        failure = record.end if record.fault in ("proxy", "upstream") else ""
        before, until = record.started, now
        for phase in trace.phases:
            if not phase.span:
                ids = (self._rolls.getrandbits(64) or 1, trace.server)
                send(phase.name, SpanKind.INTERNAL, ids, begun=before, ended=phase.at, attributes={})
            before = phase.at
        for phase in reversed(trace.phases):
            if phase.span:
                name = (
                    "invoke_agent"
                    if "gen_ai.operation.name" in phase.attributes
                    else str(phase.attributes["http.request.method"])
                )
                told = _upstream_attributes(record, phase)
                ids = (phase.span, trace.server)
                send(name, SpanKind.CLIENT, ids, begun=phase.at, ended=until, attributes=told, failure=failure)
                until = phase.at
        method = record.method if record.method in _METHODS else "HTTP"
        name = f"{method} {record.operation}" if record.operation else method
        told = _server_attributes(record)
        send(
            name,
            SpanKind.SERVER,
            (trace.server, trace.parent),
            begun=record.started,
            ended=now,
            attributes=told,
            failure=failure,
        )

    def close(self, seconds: float) -> None:
        """Send what waits, for so long at most."""
        last = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        last.start()
        last.join(seconds)


def _server_attributes(record: Record) -> dict[str, str | int | float]:
    told: dict[str, str | int | float] = {
        "http.request.method": record.method if record.method in _METHODS else "_OTHER",
        "url.path": shortened(record.path),
        "http.response.status_code": record.status,
        "http.request.body.size": record.received_bytes,
        "http.response.body.size": record.sent_bytes,
        "agent_proxy.request_id": record.request_id.decode(),
        "agent_proxy.end": str(record.end),
    }
    if record.operation:
        told["agent_proxy.operation"] = record.operation
    if record.principal is not None:
        told["agent_proxy.credential"] = record.principal.kind.value
    if record.fault:
        told["error.type"] = record.code
    return told


def _upstream_attributes(record: Record, phase: _Phase) -> dict[str, str | int | float]:
    told: dict[str, str | int | float] = dict(phase.attributes)
    told["http.response.status_code"] = record.status
    if record.first_byte_at is not None and not record.fault:
        told["agent_proxy.time_to_first_byte"] = round(record.first_byte_at - phase.at, 6)
    if record.usage is not None and "gen_ai.operation.name" in told:
        told["gen_ai.usage.input_tokens"] = record.usage.input_tokens
        told["gen_ai.usage.output_tokens"] = record.usage.output_tokens
    if record.fault in ("proxy", "upstream"):
        told["error.type"] = record.code
    return told


def begin_traces(settings: Settings) -> Tracer:
    """Build the tracer that sends to the collector of the settings, with the exporter and its thread."""
    exporter = OTLPSpanExporter(endpoint=f"{settings.otlp_url}/v1/traces", timeout=5)
    return Tracer(
        BatchSpanProcessor(exporter), ratio=settings.trace_sample_ratio, follow_caller=settings.trace_follow_caller
    )
