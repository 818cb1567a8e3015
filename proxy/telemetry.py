"""What watches the requests besides the access line, as the settings ask for it: metrics on their port, traces.

Only wiring; the libraries of what is not asked for are not even imported.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sized
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from proxy.board import PUBLISH_SECONDS, Board, Place
from proxy.logs import lines_dropped
from proxy.metrics import Metrics, Reading
from proxy.model import Watcher
from proxy.settings import Settings
from proxy.tasks import beside

if TYPE_CHECKING:
    from proxy.exposition import MetricsServer
    from proxy.traces import Tracer


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several workers is given by whoever starts them: the board, its place, the port of them all."""

    board: Board
    place: int
    listener: socket.socket


@runtime_checkable
class Connections(Protocol):
    """How many connections there are to the sidecar."""

    open: int
    idle: Sized


@runtime_checkable
class Decisions(Protocol):
    """What the limits have decided: how often, by policy and outcome; and whether they must do without Redis."""

    decisions: Mapping[tuple[str, str], int]

    @property
    def is_degraded(self) -> bool:
        """Whether decisions are made without Redis, though there should be one."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The watchers of one process, and the port of its metrics. Empty: nothing is watched."""

    metrics: Metrics | None = None
    server: "MetricsServer | None" = None
    place: Place | None = None
    tracer: "Tracer | None" = None

    @property
    def watchers(self) -> list[Watcher]:
        """Who sees each request."""
        return [watcher for watcher in (self.metrics, self.tracer) if watcher is not None]

    @asynccontextmanager
    async def watching(self, left: Callable[[], float]) -> AsyncGenerator[None]:
        """Serve the metrics and send the traces, as long as the context lasts.

        At its end `left` gives the seconds in which the last traces must be sent.
        """
        async with AsyncExitStack() as stack:
            if (tracer := self.tracer) is not None:
                stack.push_async_callback(lambda: asyncio.to_thread(tracer.close, left()))
            if self.metrics is not None:
                await stack.enter_async_context(self.metrics.sampling())
            if self.place is not None:
                await stack.enter_async_context(_publishing(self.place))
            if self.server is not None:
                self.server.start()
                stack.push_async_callback(asyncio.to_thread, self.server.close)
            yield


def begin_telemetry(settings: Settings, share: Share | None = None) -> Telemetry:
    """Build what the settings ask for. Raises OSError when the port of the metrics cannot be used."""
    metrics = server = place = tracer = None
    if settings.metrics_port is not None:
        from proxy.exposition import MetricsServer, readings_of_process  # noqa: PLC0415  only where it is asked for

        metrics = Metrics()
        metrics.sources += [readings_of_process, _own_readings]
        place = Place(share.board, share.place, metrics) if share is not None else None
        listener = share.listener if share is not None else listen_for_metrics(settings)
        server = MetricsServer(listener, place.gather if place is not None else metrics.snapshot)
    if settings.otlp_url is not None:
        from proxy.traces import begin_traces  # noqa: PLC0415  as above: it is 30 MB

        tracer = begin_traces(settings)
    return Telemetry(metrics, server, place, tracer)


def listen_for_metrics(settings: Settings) -> socket.socket:
    """Bind the port of the metrics. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.metrics_host else socket.AF_INET
    return socket.create_server((settings.metrics_host, settings.metrics_port or 0), family=family)


def _own_readings() -> Iterable[Reading]:
    yield "log_lines_dropped", (), lines_dropped()
    yield "workers", (), 1
    yield "build_info", (metadata.version("agentflow-proxy"),), 1


def connection_readings(pool: object) -> Iterable[Reading]:
    """Give the numbers of the connections to the sidecar, where `pool` has them."""
    if isinstance(pool, Connections):
        idle = len(pool.idle)
        yield "upstream_connections", ("idle",), idle
        yield "upstream_connections", ("busy",), pool.open - idle


def limit_readings(limits: object) -> Iterable[Reading]:
    """Give what `limits` count of themselves, where they do."""
    if isinstance(limits, Decisions):
        yield "limiter_degraded", (), limits.is_degraded
        for key, count in dict(limits.decisions).items():
            yield "limit_decisions", key, count


@asynccontextmanager
async def _publishing(place: Place) -> AsyncGenerator[None]:
    async def publish() -> None:
        while True:
            place.publish()
            await asyncio.sleep(PUBLISH_SECONDS)

    try:
        async with beside(publish()):
            yield
    finally:
        place.publish(leaving=True)
