"""`make bench`: every contender, round after round in turn, then a table, JSON and a picture.

Asks for no root, sends nothing off this machine, and ends by itself.
"""

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.arena import Ground, Standing, refuses, stand, stand_stub
from benchmarks.contenders import CHECKS_NOTHING, CONTENDERS
from benchmarks.contenders.model import ROOT, AbsentError, Contender
from benchmarks.figures import Result
from benchmarks.instructions import can_count
from benchmarks.machine import describe_machine
from benchmarks.measure import (
    QUICK,
    Direct,
    Plan,
    measure_direct,
    measure_events,
    measure_invokes,
    measure_open,
    measure_refusals,
)
from benchmarks.processes import TooFewCoresError, choose_cores, raise_file_limit
from benchmarks.report import Report, write_all
from benchmarks.tokens import bad_tokens, forged_tokens, make_token

STREAM_FILES = 2_500  # files that everything but the streams themselves may need


def _arguments() -> argparse.Namespace:
    keys = [contender.key for contender in CONTENDERS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=keys, default=keys, metavar="KEY", help=", ".join(keys))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open", nargs="*", type=int, default=[1000, 5000], help="open streams; none: leave them out")
    parser.add_argument("--open-rounds", type=int, default=2, help="rounds in which streams are held open")
    parser.add_argument("--short", action="store_true", help="tiny rounds, for trying things out")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="where the files go")
    parser.add_argument("--ours", type=Path, default=ROOT / ".venv" / "bin" / "agentflow-proxy")
    return parser.parse_args()


def _check(contender: Contender, standing: Standing) -> None:
    """Raise AbsentError unless the contender refuses a forged, an expired, a foreign and a misdirected token."""
    if contender.key not in CHECKS_NOTHING and not refuses(standing, bad_tokens()):
        raise AbsentError("it let a bad token through, so its figures would mean nothing")


def _measure(
    contender: Contender, ground: Ground, direct: Direct, plan: Plan, opens: list[int]
) -> tuple[str, dict[str, float]]:
    with stand(contender, ground) as standing:
        _check(contender, standing)
        values = measure_invokes(standing, direct, plan) | measure_events(standing, direct, plan)
        if contender.ours:
            values |= measure_refusals(standing, plan, forged_tokens(), 401)
        version = standing.launch.version
    if contender.ours:
        with stand(contender, ground, per_minute=1) as standing:
            values |= measure_refusals(standing, plan, [make_token("caller-0")], 429)
    for count in opens:
        with stand(contender, ground) as standing:
            values |= measure_open(standing, plan, count)
    return version, values


def main() -> int:
    """Run the benchmark; 0 unless the machine cannot."""
    asked = _arguments()
    counting = can_count()
    plan = replace(QUICK if asked.short else Plan(), counts_instructions=counting)
    files = raise_file_limit()
    opens = [count for count in asked.open if 2 * count + STREAM_FILES <= files]
    chosen = [contender for contender in CONTENDERS if contender.key in asked.only]
    results = [Result(each.key, each.title, each.job, ours=each.ours) for each in chosen]
    machine = describe_machine(instructions=counting)
    gc.disable()
    try:
        near, far = choose_cores()
        with tempfile.TemporaryDirectory(prefix="bench-") as name, stand_stub(Path(name), near) as stub:
            ground = Ground(stub, asked.ours, far)
            for number in range(asked.rounds):
                print(f"round {number + 1} of {asked.rounds}", file=sys.stderr, flush=True)
                direct = measure_direct(stub, plan)
                held = opens if number < asked.open_rounds else []
                for contender, result in zip(chosen, results, strict=True):
                    _take(contender, result, ground, direct, plan, held)
                    gc.collect()
    except TooFewCoresError as error:
        print(error, file=sys.stderr)
        return 1
    report = Report(machine, asked.rounds, results, opens)
    print(write_all(report, asked.out))
    return 0


def _take(contender: Contender, result: Result, ground: Ground, direct: Direct, plan: Plan, opens: list[int]) -> None:
    if result.absent:
        return
    began = time.monotonic()
    try:
        result.version, values = _measure(contender, ground, direct, plan, opens)
        result.add(values)
        said = f"{values.get('invoke_cpu_us', 0):.0f} µs per invoke, {values.get('event_cpu_us', 0):.1f} per event"
    except AbsentError as error:
        result.absent = said = str(error)
    print(f"  {contender.key}: {said} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
