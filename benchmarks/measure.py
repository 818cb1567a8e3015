"""Takes one round of figures from a standing contender.

Reads usage before and after each load; leaves starting, stopping and summing up to others.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import uvloop

from benchmarks.arena import Standing
from benchmarks.figures import OPEN_FIGURES, open_key
from benchmarks.instructions import Counter
from benchmarks.load import Invokes, Streams, drive_bursts, drive_invokes, drive_streams
from benchmarks.processes import Usage

ZERO = Usage(0.0, 0.0)
MANY = 100_000


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each part of a round takes, and how much it does at most."""

    warm: float = 0.7
    alone: float = 1.5
    loaded: float = 3.0
    paced: float = 4.0
    streams: int = 50
    pace_ms: int = 50
    bursts: int = 20
    burst_events: int = 1000
    burst_seconds: float = 6.0
    window: float = 5.0
    opening: float = 40.0
    counts_instructions: bool = False


QUICK = Plan(warm=0.4, alone=0.5, loaded=1.5, paced=2.0, bursts=10, window=2.0, opening=15.0)


@dataclass(frozen=True, slots=True)
class Direct:
    """What the same load gives without a proxy, in the same round."""

    alone: Invokes
    loaded: Invokes
    paced: Streams


def _usage(standing: Standing) -> Usage:
    return ZERO if standing.group is None else standing.group.usage()


def _spent[T](
    standing: Standing, plan: Plan, load: Callable[[], Awaitable[T]], warm: float = 0.0
) -> tuple[T, float, float | None]:
    """Run `load`, and give its result, the CPU µs it cost, and the instructions where they are counted."""

    async def go() -> tuple[T, float]:
        if warm:
            await drive_invokes(standing.port, standing.invokes(), in_flight=16, seconds=warm)
        before = _usage(standing).cpu
        result = await load()
        return result, (_usage(standing).cpu - before) * 1e6

    counter = None
    if plan.counts_instructions and standing.group is not None:
        counter = Counter(standing.group.tree())
        counter.start()
    result, cpu = uvloop.run(go())
    return result, cpu, counter.stop() if counter else None


def _each(prefix: str, cpu: float, instructions: float | None, count: int) -> dict[str, float]:
    if not count:
        return {}
    values = {f"{prefix}_cpu_us": cpu / count}
    return values if instructions is None else values | {f"{prefix}_instructions_k": instructions / count / 1000}


def _alone(standing: Standing, plan: Plan) -> Invokes:
    load = drive_invokes(standing.port, standing.invokes(), in_flight=1, seconds=plan.alone)
    return uvloop.run(load)


def _loaded(standing: Standing, plan: Plan) -> tuple[Invokes, float, float | None]:
    requests = standing.invokes()
    return _spent(standing, plan, lambda: drive_invokes(standing.port, requests, in_flight=16, seconds=plan.loaded))


def _paced(standing: Standing, plan: Plan) -> Streams:
    requests = standing.streams(events=MANY, pace_ms=plan.pace_ms)
    load = drive_streams(
        standing.port,
        requests,
        count=plan.streams,
        over=plan.pace_ms / 1000 * 10,
        seconds=plan.paced,
        deadline=plan.opening,
        mark=lambda: _usage(standing),
    )
    return uvloop.run(load)


def measure_direct(stub: Standing, plan: Plan) -> Direct:
    """Put the load on the stub itself."""
    uvloop.run(drive_invokes(stub.port, stub.invokes(), in_flight=16, seconds=plan.warm))
    return Direct(_alone(stub, plan), _loaded(stub, plan)[0], _paced(stub, plan))


def measure_invokes(standing: Standing, direct: Direct, plan: Plan) -> dict[str, float]:
    """Measure invokes alone and with 16 in flight."""
    uvloop.run(drive_invokes(standing.port, standing.invokes(), in_flight=16, seconds=plan.warm))
    start = _usage(standing).cpu
    alone = _alone(standing, plan)
    alone_cpu = (_usage(standing).cpu - start) * 1e6
    loaded, cpu, instructions = _loaded(standing, plan)
    values = _each("invoke", cpu, instructions, loaded.answered)
    return values | {
        "invoke_cpu_us_1": alone_cpu / max(1, alone.answered),
        "invoke_rate": loaded.rate,
        "added_p50_us_1": alone.p50_us - direct.alone.p50_us,
        "added_p99_us_1": alone.p99_us - direct.alone.p99_us,
        "added_p50_us_16": loaded.p50_us - direct.loaded.p50_us,
        "added_p99_us_16": loaded.p99_us - direct.loaded.p99_us,
        "errors": float(alone.errors + loaded.errors),
    }


def measure_events(standing: Standing, direct: Direct, plan: Plan) -> dict[str, float]:
    """Measure paced events over a few streams, then bursts over one stream after another."""
    counter = None
    if plan.counts_instructions and standing.group is not None:
        counter = Counter(standing.group.tree())
        counter.start()
    paced = _paced(standing, plan)
    counted = counter.stop() if counter else None
    spent = (paced.marks[-1].cpu - paced.marks[1].cpu) * 1e6
    share = (paced.marks[-1].cpu - paced.marks[1].cpu) / max(1e-9, paced.marks[-1].cpu - paced.marks[0].cpu)
    values = _each("event", spent, None if counted is None else counted * share, paced.events)
    values |= {
        "event_added_p50_us": paced.p50_late_us - direct.paced.p50_late_us,
        "event_added_p99_us": paced.p99_late_us - direct.paced.p99_late_us,
        "first_byte_us": paced.first_byte_us,
    }
    requests = standing.streams(events=plan.burst_events, pace_ms=0)
    bursts, cpu, instructions = _spent(
        standing,
        plan,
        lambda: drive_bursts(standing.port, requests, rounds=plan.bursts, deadline=plan.burst_seconds),
    )
    return values | _each("burst", cpu, instructions, bursts * plan.burst_events)


def measure_refusals(standing: Standing, plan: Plan, tokens: list[str], status: int) -> dict[str, float]:
    """Measure what a refusal with `status` costs; the first few answers may be others."""
    requests = standing.invokes(tokens)
    uvloop.run(drive_invokes(standing.port, requests, in_flight=4, seconds=plan.warm, most=500, expected=status))
    result, cpu, instructions = _spent(
        standing,
        plan,
        lambda: drive_invokes(standing.port, requests, in_flight=16, seconds=plan.alone, expected=status),
    )
    if result.errors:
        return {}
    return _each(f"refuse_{status}", cpu, instructions, result.answered)


def measure_open(standing: Standing, plan: Plan, count: int) -> dict[str, float]:
    """Hold `count` streams open, one event a second each, and see what they hold and cost."""
    requests = standing.streams(events=MANY, pace_ms=1000)
    load = drive_streams(
        standing.port,
        requests,
        count=count,
        over=max(1.0, count / 1000),
        seconds=plan.window,
        deadline=plan.opening,
        mark=lambda: _usage(standing),
    )
    result = asyncio.run(load, loop_factory=uvloop.new_event_loop)
    before, start, end = result.marks
    values = {
        "kib": (end.kib - before.kib) / max(1, result.opened),
        "cpu_percent": (end.cpu - start.cpu) / result.seconds * 100,
        "late_p50_us": result.p50_late_us,
        "late_p99_us": result.p99_late_us,
        "errors": float(result.errors),
        "starved": float(result.starved),
    }
    return {open_key(count, figure): values[figure.key] for figure in OPEN_FIGURES}
