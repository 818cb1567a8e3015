"""Starts what is measured on a core of its own, and reads what it has used from /proc.

Stops only what it started, by process id.
"""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

PROC = Path("/proc")
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class TooFewCoresError(Exception):
    """The machine cannot keep the load away from what is measured."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group of processes has used up to a moment: seconds of CPU, KiB of memory."""

    cpu: float
    kib: float


def choose_cores() -> tuple[int, int]:
    """Give the core for load and stub, and the core for the proxy under test. Raises TooFewCoresError below two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise TooFewCoresError("the benchmark needs two cores")
    return cores[0], cores[-1]


def end_cleanly() -> None:
    """Let SIGTERM end this process the way an exception does, so that what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def raise_file_limit() -> int:
    """Allow as many open files as the machine lets us; give that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def find_ports(count: int) -> list[int]:
    """Give `count` ports on 127.0.0.1 that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def find_tree(roots: Sequence[int]) -> list[int]:
    """Give `roots` and all their descendants that live."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid for pid in roots if (PROC / str(pid)).exists()]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def read_cpu(pids: Sequence[int]) -> float:
    """Give the seconds of CPU, user and system, that all threads of `pids` have used.

    The scheduler's nanoseconds where the kernel keeps them, else utime + stime in clock ticks.
    """
    total = 0
    for pid in pids:
        with suppress(OSError):
            try:
                threads = [(task / "schedstat").read_text() for task in (PROC / str(pid) / "task").iterdir()]
                total += sum(int(line.split()[0]) for line in threads)
            except FileNotFoundError:
                fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) * TICK_NS
    return total / 1e9


def read_memory(pids: Sequence[int]) -> float:
    """Give the KiB of memory that `pids` hold, pages shared among processes divided by their number (PSS)."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += float(line.split()[1])
    return total


class Group:
    """The processes of one contender, or of the stub; a context manager that stops them."""

    def __init__(self, core: int, log: Path) -> None:
        self.core = core
        self.log = log
        self.started: list[subprocess.Popen[bytes]] = []
        self._output: IO[bytes] | None = None

    def start(self, command: Sequence[str], *, environment: Mapping[str, str], directory: Path) -> None:
        """Start `command` on the group's core; it sees that core alone from its first instruction."""
        if self._output is None:
            self._output = self.log.open("ab")
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self.core})
        try:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, allowed)
        self.started.append(process)

    def alive(self) -> bool:
        """Say whether every started process still runs."""
        return all(process.poll() is None for process in self.started)

    def tree(self) -> list[int]:
        """Give the ids of all processes of the group."""
        return find_tree([process.pid for process in self.started])

    def cpu(self) -> float:
        """Give the CPU seconds that the group has used."""
        return read_cpu(self.tree())

    def usage(self) -> Usage:
        """Give the CPU seconds used and the KiB held."""
        pids = self.tree()
        return Usage(read_cpu(pids), read_memory(pids))

    def stop(self) -> None:
        """Ask everything to end, and after five seconds end it."""
        remains = self.tree()
        for process in self.started:
            process.terminate()
        for process in self.started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        for pid in remains:
            if (PROC / str(pid)).exists() and _is_ours(pid, self.started):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()
        if self._output is not None:
            self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _is_ours(pid: int, started: Sequence[subprocess.Popen[bytes]]) -> bool:
    sessions = {process.pid for process in started}  # each was started as the leader of its own session
    try:
        return os.getsid(pid) in sessions
    except ProcessLookupError:
        return False
