"""Serving `/metrics` on a port of its own, in Prometheus's text format, from a thread of its own.

Answers whoever reaches the port: it holds no caller's name. Never touches the event loop that serves requests.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import Any, Final, override
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import PROCESS_COLLECTOR, CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from proxy.families import FAMILIES, PREFIX, Family
from proxy.metrics import Reading, Snapshot

PATH: Final = "/metrics"
_PATIENCE_SECONDS: Final = 5


class SnapshotCollector(Collector):
    """Gives Prometheus's client the numbers of a snapshot."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    @override
    def collect(self) -> Iterator[Metric]:
        for name, rows in self._take().items():
            yield _family(FAMILIES[name], rows)


def _family(family: Family, rows: Iterable[tuple[tuple[str, ...], list[float]]]) -> Metric:
    name = family.name if family.name.startswith("process_") else PREFIX + family.name
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.text, labels=family.labels)
        bounds = [*(f"{bound:g}" for bound in family.bounds), "+Inf"]
        for labels, (*counts, total) in rows:
            histogram.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.text, labels=family.labels)
    for labels, (value,) in rows:
        metric.add_metric(labels, value)
    return metric


def readings_of_process() -> Iterator[Reading]:
    """Give what Prometheus's client knows of this process: CPU time, memory, open files."""
    for metric in PROCESS_COLLECTOR.collect():
        for sample in metric.samples:
            yield sample.name.removesuffix("_total"), (), sample.value


def _ignore(*_: object) -> None:
    """Say nothing: of each scrape, and of a scraper that hung up."""


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE_SECONDS

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    handle_error = _ignore  # type: ignore[assignment]  # takes what it is given


class MetricsServer:
    """Serves what `take` gives on a listening socket, until closed."""

    def __init__(self, listener: socket.socket, take: Callable[[], Snapshot]) -> None:
        registry = CollectorRegistry()
        registry.register(SnapshotCollector(take))
        self._metrics = make_wsgi_app(registry)
        self._server = _Server(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        self._server.server_name, self._server.server_port = "metrics", listener.getsockname()[1]
        self._server.setup_environ()
        self._server.set_app(self._answer)
        host, port = listener.getsockname()[:2]
        self.address = f"{host}:{port}"
        """Where it is served."""

    def start(self) -> None:
        """Begin to answer."""
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:  # noqa: ANN401  WSGI
        if environ["PATH_INFO"] == PATH and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        start_response(f"{HTTPStatus.NOT_FOUND} Not Found", [("Content-Length", "0")])
        return []
