"""Puts load on one address and says what came back: rates, latencies, lateness, open streams.

Bounded in count and time; knows nothing of who is being measured.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from benchmarks.client import Asker, Tally, Watch, Watcher
from benchmarks.processes import Usage

OPENING = 64  # streams that may be waiting for their first byte at once


@dataclass(frozen=True, slots=True)
class Invokes:
    """What a closed loop of invokes gave; seconds and microseconds as named."""

    answered: int
    errors: int
    seconds: float
    p50_us: float
    p99_us: float

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Streams:
    """What a window over open streams gave; `starved` had no event in it, `errors` never opened or broke off."""

    opened: int
    errors: int
    starved: int
    events: int
    seconds: float
    p50_late_us: float
    p99_late_us: float
    first_byte_us: float
    marks: tuple[Usage, ...] = field(default=())


def percentile(values: Sequence[float], share: float) -> float:
    """Give the value below which `share` of the sorted `values` lie, 0 for none."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


async def drive_invokes(
    port: int, requests: list[bytes], *, in_flight: int, seconds: float, most: int = 200_000, expected: int = 200
) -> Invokes:
    """Keep `in_flight` requests going for `seconds` or until `most` were sent."""
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    tally = Tally(requests, began + seconds, most, str(expected).encode())
    done = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def finish(_: Asker, again: bool) -> None:
        tally.open -= 1
        if again:
            task = loop.create_task(connect())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        elif not tally.open:
            done.set()

    async def connect() -> None:
        tally.open += 1
        try:
            await loop.create_connection(lambda: Asker(tally, finish), "127.0.0.1", port)
        except OSError:
            tally.errors += 1
            tally.open -= 1
            if not tally.open:
                done.set()

    await asyncio.gather(*(connect() for _ in range(in_flight)))
    with suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), seconds + 15)
    latencies = sorted(value * 1e6 for value in tally.latencies)
    return Invokes(
        tally.answered,
        tally.errors,
        max(tally.ended - began, 0.0),
        percentile(latencies, 0.50),
        percentile(latencies, 0.99),
    )


@asynccontextmanager
async def open_streams(
    port: int, requests: list[bytes], watch: Watch, *, count: int, over: float, deadline: float
) -> AsyncIterator[list[Watcher]]:
    """Open `count` streams, spread evenly over `over` seconds where the proxy keeps up, then close them."""
    loop = asyncio.get_running_loop()
    watchers: list[Watcher] = []
    gate = asyncio.Semaphore(OPENING)
    limit = loop.time() + deadline
    start = loop.time()

    async def open_one(number: int) -> None:
        await asyncio.sleep(max(0.0, start + over * number / count - loop.time()))
        async with gate:
            left = limit - loop.time()
            if left <= 0:
                return
            request = requests[number % len(requests)]
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(left):
                    make = partial(Watcher, watch, request)
                    _, watcher = await loop.create_connection(make, "127.0.0.1", port)
                    watchers.append(watcher)
                    await asyncio.shield(watcher.opened)

    try:
        await asyncio.gather(*(open_one(number) for number in range(count)))
        yield watchers
    finally:
        for watcher in watchers:
            watcher.leave()
        await asyncio.sleep(0.05)


async def drive_streams(
    port: int,
    requests: list[bytes],
    *,
    count: int,
    over: float,
    seconds: float,
    deadline: float,
    mark: Callable[[], Usage],
) -> Streams:
    """Open `count` streams, watch them for `seconds`, leave; `mark` is read before, and around the watching."""
    watch = Watch()
    marks = [mark()]
    async with open_streams(port, requests, watch, count=count, over=over, deadline=deadline) as watchers:
        await asyncio.sleep(min(1.0, seconds / 4))
        before = [watcher.events for watcher in watchers]
        marks.append(mark())
        began = time.monotonic()
        await asyncio.sleep(0.1)  # what waited while the mark was read is not late by the proxy's fault
        watch.recording = True
        await asyncio.sleep(seconds)
        watch.recording = False
        lasted = time.monotonic() - began
        marks.append(mark())
        events = sum(watcher.events for watcher in watchers) - sum(before)
        alive = [watcher for watcher in watchers if watcher.transport is not None and watcher.status == b"200"]
        moved = sum(watcher.events > seen for watcher, seen in zip(watchers, before, strict=True))
    late = sorted(value * 1e6 for value in watch.lateness)
    first = sorted(value * 1e6 for value in watch.first_bytes)
    return Streams(
        opened=len(alive),
        errors=count - len(alive),
        starved=count - moved,
        events=events,
        seconds=lasted,
        p50_late_us=percentile(late, 0.50),
        p99_late_us=percentile(late, 0.99),
        first_byte_us=percentile(first, 0.50),
        marks=tuple(marks),
    )


async def drive_bursts(port: int, requests: list[bytes], *, rounds: int, deadline: float) -> int:
    """Read up to `rounds` streams, one after another, as fast as they come; give how many came to their end."""
    loop = asyncio.get_running_loop()
    watch = Watch()
    limit = loop.time() + deadline
    whole = 0
    for number in range(rounds):
        if loop.time() >= limit:
            break
        make = partial(Watcher, watch, requests[number % len(requests)])
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout_at(limit):
                _, watcher = await loop.create_connection(make, "127.0.0.1", port)
                whole += await asyncio.shield(watcher.finished)
                watcher.leave()
    return whole


async def until_ready(attempt: Callable[[], Awaitable[bool]], *, seconds: float, alive: Callable[[], bool]) -> bool:
    """Repeat `attempt` until it succeeds, the process is gone, or `seconds` have passed."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and alive():
        with suppress(OSError):
            if await attempt():
                return True
        await asyncio.sleep(0.05)
    return False
