"""Counts a contender's user-space instructions under valgrind, where `perf` cannot: slow, but the same every time.

The kernel's share is not in it; contenders that do not run under valgrind are left out.
"""

import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.arena import Ground, Standing, stand, stand_stub
from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.model import ROOT, AbsentError, Contender, Launch, Place
from benchmarks.load import drive_bursts, drive_invokes, drive_streams
from benchmarks.processes import Usage, choose_cores, find_tree
from benchmarks.tokens import forged_tokens

REQUESTS = 400
BURST_EVENTS = 5_000
OBEYS_WITHIN = 30.0
STARTS_WITHIN = 480.0
"""Under valgrind, on a machine that has other things to do; alone it takes a minute."""
TOTAL = re.compile(r"^(?:totals|summary): (\d+)", re.MULTILINE)


def can_count() -> bool:
    """Say whether valgrind and its control program are here."""
    return all(shutil.which(name) for name in ("valgrind", "callgrind_control"))


def _wrap(contender: Contender, output: Path) -> Contender:
    tool = ("valgrind", "--tool=callgrind", "--trace-children=yes", f"--callgrind-out-file={output}/%p", "--quiet")

    def prepare(place: Place) -> Launch:
        launch = contender.prepare(place)
        commands = tuple((*tool, *command) for command in launch.commands)
        return replace(launch, commands=commands, ready_seconds=STARTS_WITHIN)

    return replace(contender, prepare=prepare)


def _control(flag: str, standing: Standing, pids: Sequence[int]) -> None:
    """Give each process one order; an idle one hears it only while it works, so it gets a few requests."""
    for pid in pids:
        command = ["callgrind_control", flag, str(pid)]  # found on the path by design
        order = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + OBEYS_WITHIN
        while order.poll() is None and time.monotonic() < limit:
            asyncio.run(drive_invokes(standing.port, standing.invokes()[:1], in_flight=1, seconds=1, most=1))
            time.sleep(0.05)
        if order.poll() is None:
            order.kill()
            order.wait()
            raise AbsentError("valgrind's control did not reach it")


def _total(output: Path) -> int:
    return sum(int(found[1]) for path in output.iterdir() if (found := TOTAL.search(path.read_text(errors="replace"))))


def _count(standing: Standing, output: Path, load: Callable[[], Awaitable[int]]) -> float:
    """Give the thousands of instructions for each unit that `load` says it did."""
    assert standing.group is not None  # noqa: S101  the stub is never counted
    pids = [pid for pid in standing.group.tree() if len(find_tree([pid])) == 1]  # workers, no masters
    for path in output.iterdir():
        path.unlink()
    _control("--zero", standing, pids)

    async def go() -> int:
        return await load()

    units = asyncio.run(go())
    _control("--dump", standing, pids)
    return _total(output) / max(1, units) / 1000


def count_instructions(contender: Contender, ground: Ground) -> dict[str, float]:
    """Count invokes, paced and burst events, and, for ours, refusals. Raises AbsentError where it does not start."""
    values = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, stand(_wrap(contender, Path(name)), ground) as standing:
        output = Path(name)

        def invokes(tokens: list[str] | None = None, expected: int = 200) -> Callable[[], Awaitable[int]]:
            async def load() -> int:
                requests = standing.invokes(tokens)
                result = await drive_invokes(
                    standing.port, requests, in_flight=4, seconds=120, most=REQUESTS, expected=expected
                )
                return result.answered

            return load

        async def events() -> int:
            # Enough events on few streams that opening them hardly counts.
            requests = standing.streams(events=10_000, pace_ms=100)
            seen = await drive_streams(
                standing.port, requests, count=4, over=0.1, seconds=15, deadline=60, mark=lambda: Usage(0, 0)
            )
            return seen.events

        async def bursts() -> int:
            # One stream after another, as fast as they come; how many events share a read is in the figure.
            requests = standing.streams(events=BURST_EVENTS, pace_ms=0)
            return await drive_bursts(standing.port, requests, rounds=3, deadline=60) * BURST_EVENTS

        asyncio.run(_warm(invokes()))
        values["invoke_user_instructions_k"] = _count(standing, output, invokes())
        values["event_user_instructions_k"] = _count(standing, output, events)
        values["burst_user_instructions_k"] = _count(standing, output, bursts)
        if contender.ours:
            asyncio.run(_warm(invokes(forged_tokens(), 401)))
            values["refuse_401_user_instructions_k"] = _count(standing, output, invokes(forged_tokens(), 401))
    return values


async def _warm(load: Callable[[], Awaitable[int]]) -> None:
    await load()


def main() -> int:
    """Print the figures of ours, or of the contenders named as arguments."""
    if not can_count():
        print("valgrind is not installed", file=sys.stderr)
        return 1
    asked = sys.argv[1:] or ["ours"]
    near, far = choose_cores()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, stand_stub(Path(name), near) as stub:
        ground = Ground(stub, ROOT / ".venv" / "bin" / "agentflow-proxy", far)
        for contender in CONTENDERS:
            if contender.key in asked:
                try:
                    for key, value in count_instructions(contender, ground).items():
                        print(f"{contender.title}: {key} {value:,.1f}", flush=True)
                except AbsentError as error:
                    print(f"{contender.title}: absent: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
