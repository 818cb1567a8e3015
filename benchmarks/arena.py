"""Brings the stub and one contender up on their cores, waits until it answers, and takes it down.

Measures nothing.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders.model import NEVER, ROOT, AbsentError, Contender, Launch, Place, plain_environment
from benchmarks.load import drive_invokes, until_ready
from benchmarks.processes import Group, end_cleanly, find_ports
from benchmarks.tokens import make_body, make_request, make_tokens


@dataclass(frozen=True, slots=True)
class Standing:
    """A contender that answers: where, and its processes; `group` is None for the stub, which has a `socket` too."""

    port: int
    launch: Launch
    group: Group | None
    socket: Path | None = None

    def invokes(self, tokens: list[str] | None = None) -> list[bytes]:
        """Write one invoke for each caller."""
        return [make_request(self.launch.invoke, token, make_body()) for token in tokens or make_tokens()]

    def streams(self, *, events: int, pace_ms: int) -> list[bytes]:
        """Write one stream request for each caller."""
        body = make_body(f"[words {events}] [pace {pace_ms}ms]")
        return [make_request(self.launch.stream, token, body) for token in make_tokens()]


async def _answers(port: int, request: bytes, expected: int) -> bool:
    result = await drive_invokes(port, [request], in_flight=1, seconds=5, most=1, expected=expected)
    return result.answered == 1 and result.errors == 0


@dataclass(frozen=True, slots=True)
class Ground:
    """What stays the same while contenders come and go: the stub, our command, and the core for the proxy."""

    stub: Standing
    ours: Path
    core: int


@contextmanager
def stand_stub(directory: Path, core: int) -> Iterator[Standing]:
    """Run the stub on `core`, where this process goes too."""
    end_cleanly()
    os.sched_setaffinity(0, {core})
    port = find_ports(1)[0]
    with Group(core, directory / "stub.log") as group:
        path = directory / "stub.sock"
        command = (sys.executable, "-m", "benchmarks.upstream", str(port), str(path))
        group.start(command, environment=plain_environment(PYTHONPATH=str(ROOT)), directory=directory)
        standing = Standing(port, Launch("", ()), None, path)
        ready = until_ready(lambda: _answers(port, standing.invokes()[0], 200), seconds=20, alive=group.alive)
        if not asyncio.run(ready):
            raise RuntimeError("the stub did not start")
        yield standing


@contextmanager
def stand(contender: Contender, ground: Ground, *, per_minute: int = NEVER) -> Iterator[Standing]:
    """Run `contender` in front of the stub from its first good answer on.

    Raises AbsentError when it cannot be had or gives no such answer.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        ports = find_ports(3)
        stub, spare = ground.stub, (ports[1], ports[2])
        launch = contender.prepare(
            Place(directory, ports[0], stub.port, spare, ground.ours, per_minute, upstream_socket=stub.socket)
        )
        with Group(ground.core, directory / "log") as group:
            for command in launch.commands:
                group.start(command, environment=launch.environment, directory=directory)
            standing = Standing(ports[0], launch, group)
            request = standing.invokes()[0]
            ready = until_ready(
                lambda: _answers(standing.port, request, 200), seconds=launch.ready_seconds, alive=group.alive
            )
            if not asyncio.run(ready):
                codes = [process.poll() for process in group.started]
                print(group.log.read_text(errors="replace")[-2000:], file=sys.stderr)
                ended = next((code for code in codes if code is not None), None)
                raise AbsentError("did not answer in time" if ended is None else f"ended at start with code {ended}")
            yield standing


def refuses(standing: Standing, tokens: list[str]) -> bool:
    """Say whether each of `tokens` is answered with 401 or 403: a contender that checks nothing is found out."""
    requests = standing.invokes(tokens)
    return all(
        any(asyncio.run(_answers(standing.port, request, status)) for status in (401, 403)) for request in requests
    )
