"""What each phase of our own invoke costs, timed inside a running app: a slow phase names itself.

Runs with the product's interpreter. `TIMED` follows `proxy.routes`: add a row where that gains a phase.
"""

import functools
import inspect
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

import proxy.routes
from benchmarks.arena import stand_stub
from benchmarks.contenders.model import Place
from benchmarks.contenders.ours import environment
from benchmarks.processes import choose_cores
from benchmarks.tokens import make_body, make_token
from proxy.accesslog import AccessLog
from proxy.admission import Limits
from proxy.app import create_app
from proxy.authentication import Authentication, Authenticator
from proxy.environment import load
from proxy.logs import configure_logging
from proxy.metrics import Metrics
from proxy.model import Inbox
from proxy.relay import Relay
from proxy.settings import Settings
from proxy.telemetry import Telemetry
from proxy.tokens import InternalIdentity

ROUNDS = 7
REQUESTS = 2_000
BODY = make_body()

TIMED: tuple[tuple[str, Any, str], ...] = (
    ("authentication: read", Authentication, "_read"),
    ("authentication: recall", Authenticator, "recall"),
    ("policy: authorize", proxy.routes, "authorize"),
    ("limit: the caller's tag", proxy.routes, "tag_of"),
    ("limit: admit and its headers", Limits, "admit"),
    ("body: read", proxy.routes, "read_body"),
    ("tenancy: bind the body", proxy.routes, "bind_run"),
    ("forward: internal identity", InternalIdentity, "token"),
    ("forward: headers", proxy.routes, "request_upstream"),
    ("relay: upstream and back", Relay, "_relay_run"),
    ("observability: access line", AccessLog, "end"),
    ("observability: metrics", Metrics, "end"),
)


class Clock:
    """Adds up the CPU nanoseconds spent in each phase, less what reading the clock costs."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = {}
        start = time.thread_time_ns()
        for _ in range(9_999):
            time.thread_time_ns()
        self.cost = (time.thread_time_ns() - start) // 10_000

    def watch(self, label: str, owner: Any, name: str) -> None:  # noqa: ANN401  a module or a class
        """Replace `owner.name` with itself, timed."""
        inner = getattr(owner, name)
        self.spent[label] = 0

        def note(start: int) -> None:
            self.spent[label] += time.thread_time_ns() - start - self.cost

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  whatever it wraps
            start = time.thread_time_ns()
            try:
                return inner(*args, **kwargs)
            finally:
                note(start)

        @functools.wraps(inner)
        async def timed_awaited(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as above
            start = time.thread_time_ns()
            try:
                return await inner(*args, **kwargs)
            finally:
                note(start)

        setattr(owner, name, timed_awaited if inspect.iscoroutinefunction(inner) else timed)


async def _discard(message: Any) -> None:  # noqa: ANN401  an ASGI message
    del message


class _Here(Inbox):
    """An invoke's inbox as our server has it: the whole body has come, and the client stays."""

    def take_body(self) -> bytes:
        return BODY

    def on_leave(self, left: Callable[[], None] | None) -> None:
        del left


def _scope(token: str) -> dict[str, Any]:
    headers = {
        "host": "127.0.0.1",
        "authorization": f"Bearer {token}",
        "content-type": "application/json",
        "accept": "application/x-ndjson, application/json",
        "user-agent": "bench",
        "content-length": str(len(BODY)),
    }
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/agent/invoke",
        "raw_path": b"/agent/invoke",
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8000),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


async def measure(settings: Settings, clock: Clock) -> tuple[dict[str, float], float]:
    """Give the µs of CPU of each phase, and of a whole invoke without the server around it; medians of rounds."""
    app = create_app(settings, telemetry=Telemetry(Metrics()))
    token = make_token("caller-0")
    samples: dict[str, list[float]] = {label: [] for label in clock.spent}
    wholes = []
    for _ in range(ROUNDS + 1):
        before = dict(clock.spent)
        start = time.thread_time_ns()
        for _ in range(REQUESTS):
            await app(_scope(token), _Here(), _discard)
        wholes.append((time.thread_time_ns() - start) / REQUESTS / 1000)
        for label, spent in clock.spent.items():
            samples[label].append((spent - before[label]) / REQUESTS / 1000)
    return {label: median(values[1:]) for label, values in samples.items()}, median(wholes[1:])


def main() -> int:
    """Print the table."""
    near, far = choose_cores()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        stand_stub(Path(name), near) as stub,
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
    ):
        configure_logging("info", nowhere)
        os.sched_setaffinity(0, {far})
        settings = load(environment(Place(Path(name), 0, stub.port, (0, 0), Path(name))))
        clock = Clock()
        for label, owner, attribute in TIMED:
            clock.watch(label, owner, attribute)
        phases, whole = uvloop.run(measure(settings, clock))
        logging.getLogger().handlers.clear()
    rest = whole - sum(phases.values())
    rows = [*phases.items(), ("rest: routing, ids, middleware", rest), ("whole, without the server", whole)]
    print(f"{'phase':<32} {'CPU µs':>8} {'share':>6}")
    for label, spent in rows:
        print(f"{label:<32} {spent:>8.1f} {spent / whole:>6.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
