"""Counting: every request into plain numbers, which become Prometheus's metrics only when somebody asks.

Knows nothing of HTTP or Prometheus; a request costs it a few additions (docs/adr/0014).
"""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

from proxy.ends import End
from proxy.errors import Problem
from proxy.families import FAMILIES
from proxy.model import Headers, Record, Usage
from proxy.operations import OPERATIONS, STREAM, Kind
from proxy.tasks import beside

type Snapshot = dict[str, list[tuple[tuple[str, ...], list[float]]]]
"""For each family its rows: the labels' values, and one number, or a histogram's buckets and sum."""

type Reading = tuple[str, tuple[str, ...], float]
"""What is only known when asked: a family, the labels' values, the number."""

LAG_SECONDS: Final = 0.25
NONE: Final = "none"
_RUNS: Final = frozenset(row.name for row in OPERATIONS if row.kind in (Kind.RUN, Kind.AG_UI))
_STREAMS: Final = frozenset(row.name for row in OPERATIONS if row.name in _RUNS and row.scope == STREAM)
_TALKS: Final = frozenset(row.name for row in OPERATIONS if row.kind is Kind.DUPLEX)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OK: Final = 200


class Histogram:
    """Counts of values up to each bound, the rest, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0.0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class _PerOperation:
    """What is counted for one operation."""

    __slots__ = ("durations", "first_bytes", "received", "runs", "sent")

    def __init__(self) -> None:
        bounds = FAMILIES["request_duration_seconds"].bounds
        self.durations = Histogram(bounds)
        self.first_bytes = Histogram(bounds)
        self.runs = Histogram(bounds)
        self.received = 0
        self.sent = 0

    def rows(self) -> Iterator[tuple[str, list[float]]]:
        """Give each family's numbers."""
        for name, histogram in (
            ("request_duration_seconds", self.durations),
            ("time_to_first_byte_seconds", self.first_bytes),
            ("run_duration_seconds", self.runs),
        ):
            yield name, [*histogram.counts, histogram.sum]
        yield "received_bytes", [self.received]
        yield "sent_bytes", [self.sent]


class Metrics:
    """The numbers of one process. Implements `model.Watcher`. `sources` are asked whenever somebody looks."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, int, str], int] = {}
        self._counts: dict[tuple[str, ...], int] = dict.fromkeys(_from_the_start(), 0)
        self._operations: dict[str, _PerOperation] = {}
        self._lag = Histogram(FAMILIES["event_loop_lag_seconds"].bounds)
        self._live: dict[int, Record] = {}
        self._abandoned: list[Record] = []
        self._before: Snapshot = {}
        self.sources: list[Callable[[], Iterable[Reading]]] = []

    def begin(self, record: Record, headers: Headers) -> None:  # noqa: ARG002  `model.Watcher`
        """See `model.Watcher`."""
        self._live[id(record)] = record

    def end(self, record: Record, now: float) -> None:
        """See `model.Watcher`."""
        self._live.pop(id(record), None)
        operation = record.operation or NONE
        method = record.method if record.method in _METHODS else "other"
        key = (operation, method, record.status, record.principal.kind if record.principal is not None else NONE)
        self._requests[key] = self._requests.get(key, 0) + 1
        per = self._operations.get(operation)
        if per is None:
            per = self._operations[operation] = _PerOperation()
        duration = now - record.started
        per.durations.observe(duration)
        if record.first_byte_at is not None:
            per.first_bytes.observe(record.first_byte_at - record.started)
        per.received += record.received_bytes
        per.sent += record.sent_bytes
        if record.forwarded:
            self._count_runs(operation, record, per, duration)
        if record.fault:
            self._count("problems", record.code, record.fault)
        if record.goes_on:
            self._abandoned.append(record)
        elif record.usage is not None:
            self._count_usage(operation, record.usage, record.turns)

    def _count_runs(self, operation: str, record: Record, per: _PerOperation, duration: float) -> None:
        if operation in _RUNS:
            self._count("runs", operation, record.end)
            if record.status == _OK:
                per.runs.observe(duration)
                if operation in _STREAMS:
                    self._count("stream_end", record.end)
        elif record.run_ends is not None:
            for end, count in record.run_ends.items():
                self._count("runs", operation, end, by=count)

    def _count_usage(self, operation: str, usage: Usage, turns: int) -> None:
        counts, estimated = self._counts, "true" if usage.estimated else "false"
        read, written = (
            ("model_tokens", operation, "input", estimated),
            ("model_tokens", operation, "output", estimated),
        )
        counts[read] = counts.get(read, 0) + usage.input_tokens
        counts[written] = counts.get(written, 0) + usage.output_tokens
        counts["turns", operation] = counts.get(("turns", operation), 0) + turns

    def _settle(self) -> None:
        """Count what the runs have used that went on without their clients, and are over."""
        over = [record for record in self._abandoned if not record.goes_on]
        if over:
            self._abandoned = [record for record in self._abandoned if record.goes_on]
            for record in over:
                if record.usage is not None:
                    self._count_usage(record.operation, record.usage, record.turns)

    def _count(self, *key: str, by: int = 1) -> None:
        self._counts[key] = self._counts.get(key, 0) + by

    @asynccontextmanager
    async def sampling(self) -> AsyncGenerator[None]:
        """Measure how late the event loop is, as long as the context lasts."""
        async with beside(self._sample()):
            yield

    async def _sample(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._lag.observe(max(0.0, loop.time() - due))
            self._settle()

    def snapshot(self) -> Snapshot:
        """Give every number as it is. May be asked from any thread: what the loop changes is copied first."""
        rows: Snapshot = {name: [] for name in FAMILIES}
        for (operation, method, status, credential), count in self._requests.copy().items():
            rows["requests"].append(((operation, method, str(status), credential), [count]))
        for (name, *labels), count in self._counts.copy().items():
            rows[name].append((tuple(map(str, labels)), [count]))
        for operation, per in self._operations.copy().items():
            for name, values in per.rows():
                rows[name].append(((operation,), values))
        rows["event_loop_lag_seconds"].append(((), [*self._lag.counts, self._lag.sum]))
        live = list(self._live.copy().values())
        rows["requests_in_flight"].append(((), [len(live)]))
        rows["streams_active"].append(((), [sum(_is_stream(record) for record in live)]))
        for operation in sorted(_RUNS):
            running = sum(record.operation == operation and record.forwarded for record in live)
            rows["runs_in_flight"].append(((operation,), [running]))
        for operation in sorted(_TALKS):
            running = sum(record.running for record in live if record.operation == operation)
            rows["runs_in_flight"].append(((operation,), [running]))
        rows["runs_abandoned"].append(((), [sum(record.goes_on for record in self._abandoned.copy())]))
        for source in self.sources:
            for name, labels_given, value in source():
                rows[name].append((labels_given, [value]))
        return merged([rows, self._before]) if self._before else rows

    def continue_from(self, before: Snapshot) -> None:
        """Count on from what the worker counted whose place this one takes, so that no counter ever falls."""
        self._before = {name: rows for name, rows in before.items() if FAMILIES[name].kind != "gauge"}


def _from_the_start() -> Iterator[tuple[str, ...]]:
    """Give what is told before it happens, as 0: a rate does not see the first time of what was not there before."""
    for end in End:
        yield "stream_end", end
        for operation in sorted(_RUNS):
            yield "runs", operation, end
    for kind in _kinds(Problem):
        if "code" in vars(kind):
            yield "problems", kind.code, kind.fault


def _kinds(kind: type[Problem]) -> Iterator[type[Problem]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _is_stream(record: Record) -> bool:
    return record.operation in _STREAMS and record.status == _OK


def merged(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Give the numbers of several processes as one."""
    numbers: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in FAMILIES}
    for snapshot in snapshots:
        for name, rows in snapshot.items():
            combine: Any = {"sum": sum, "min": min, "max": max}[FAMILIES[name].merge]
            for labels, values in rows:
                known = numbers[name].get(labels)
                both = values if known is None else [combine(pair) for pair in zip(known, values, strict=True)]
                numbers[name][labels] = both
    return {name: list(rows.items()) for name, rows in numbers.items()}
