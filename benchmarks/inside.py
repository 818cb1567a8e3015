"""`python -m benchmarks.inside`: counts the instructions of an invoke under valgrind, and which functions they go to.

The real server protocol, application and pool, on transports in memory: no socket, no scheduler, and so the same
figures each time, on a busy machine too. What the kernel and the event loop do is not in them. Runs with the product's
interpreter; a function's own figure includes what it calls.
"""

import argparse
import asyncio
import bisect
import gc
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final, override

import uvicorn
import uvloop
from uvicorn.server import ServerState

from benchmarks.contenders.model import ROOT, Place
from benchmarks.contenders.ours import environment
from benchmarks.tokens import make_body, make_request, make_token
from benchmarks.upstream import INVOKE
from proxy.app import create_app
from proxy.environment import load
from proxy.logs import configure_logging
from proxy.metrics import Metrics
from proxy.protocol import OneAtATime
from proxy.telemetry import Telemetry
from proxy.upstream import Connection, Pool

WARM: Final = 300
REQUESTS: Final = 500
SHOWN: Final = 60
_TOTAL: Final = re.compile(r"^(?:totals|summary): (\d+)", re.MULTILINE)
_NAMED: Final = re.compile(r"c?fn=\((\d+)\)(?: (.*))?$")
_ADDRESS: Final = re.compile(r"0x([0-9a-f]+)(?:'\d+)?$")


class Wire(asyncio.Transport):
    """A transport that leads nowhere; a sidecar's answers each request with the stub's answer."""

    def __init__(self, sidecar: Connection | None = None) -> None:
        super().__init__()
        self._sidecar = sidecar
        self._pair = socket.socketpair()
        self.written = b""

    @override
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        known = {"socket": self._pair[0], "peername": ("127.0.0.1", 50_000), "sockname": ("127.0.0.1", 8000)}
        return known.get(name, default)

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written = bytes(data)
        if self._sidecar is not None:
            asyncio.get_running_loop().call_soon(self._sidecar.data_received, INVOKE)

    @override
    def is_closing(self) -> bool:
        return False

    @override
    def pause_reading(self) -> None:
        pass

    @override
    def resume_reading(self) -> None:
        pass


class Near(Pool):
    """A pool whose connections are such wires."""

    async def _connect(self, seconds: float) -> Connection:
        del seconds
        self.open += 1
        connection = Connection(self._give_back)
        connection.connection_made(Wire(connection))
        return connection


def _order(flag: str) -> None:
    command = ["callgrind_control", "-i", flag, str(os.getpid())]  # found on the path by design
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


async def serve(requests: int) -> None:
    """Serve so many invokes while valgrind counts, after some while it does not."""
    place = Place(ROOT, 0, 1, (0, 0), ROOT)
    pool = Near("http://127.0.0.1:1", most=64, most_idle=64, idle_seconds=60)
    app = create_app(load(environment(place)), upstream=pool, telemetry=Telemetry(Metrics()))
    config = uvicorn.Config(app, lifespan="off", log_config=None, proxy_headers=False, server_header=False)
    config.load()
    wire, protocol = Wire(), OneAtATime(config, ServerState(), {})
    protocol.connection_made(wire)
    request = make_request("/agent/invoke", make_token("caller-0"), make_body())

    async def ask(times: int) -> None:
        for _ in range(times):
            protocol.data_received(request)
            await asyncio.gather(*protocol.tasks)
            if not wire.written.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(wire.written.decode(errors="replace"))

    await ask(WARM)
    gc.collect()
    gc.freeze()
    _order("on")
    await ask(requests)
    _order("off")


def count(directory: Path, *, by_function: bool) -> tuple[float, dict[str, tuple[float, float]]]:
    """Give the thousands of instructions for each invoke; by function, those and how often it is called."""
    tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={directory}/out", "--quiet"]
    python = [sys.executable, *(["-X", "perf"] if by_function else []), "-m", "benchmarks.inside", "--serve"]
    process = subprocess.Popen([*tool, *python], cwd=ROOT)
    if process.wait():
        raise SystemExit(process.returncode)
    dump = max(directory.iterdir(), key=lambda path: path.stat().st_size).read_text(errors="replace")
    total = max(int(found[1]) for found in _TOTAL.finditer(dump))
    table = Path(tempfile.gettempdir()) / f"perf-{process.pid}.map"  # where `-X perf` writes it
    functions = _by_function(dump, _read_map(table)) if by_function else {}
    return total / REQUESTS / 1000, functions


def _read_map(table: Path) -> list[tuple[int, int, str]]:
    """Give where the code of each function lies: beginning, end, name."""
    rows = []
    for line in table.read_text(errors="replace").splitlines():
        begin, size, name = line.split(" ", 2)
        rows.append((int(begin, 16), int(begin, 16) + int(size, 16), name))
    table.unlink()
    return sorted(rows)


def _by_function(dump: str, table: list[tuple[int, int, str]]) -> dict[str, tuple[float, float]]:
    names: dict[str, str] = {}
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    called, times = "", 0
    for line in dump.splitlines():
        if (named := _NAMED.match(line)) is not None:
            if named[2]:
                names[named[1]] = named[2]
            called = named[1]
        elif line.startswith("calls="):
            times = int(line[6:].split()[0])
        elif times and line[:1] in "+-*0123456789":
            spent[called] += int(line.split()[1])
            calls[called] += times
            times = 0
    begins = [begin for begin, _, _ in table]
    found: dict[str, tuple[float, float]] = {}
    for number, name in names.items():
        if (address := _ADDRESS.match(name)) is not None:
            place = int(address[1], 16)
            at = bisect.bisect_right(begins, place) - 1
            if at >= 0 and place < table[at][1]:
                before = found.get(table[at][2], (0.0, 0.0))
                found[table[at][2]] = (before[0] + spent[number], before[1] + calls[number])
    return {name: (total / REQUESTS / 1000, times / REQUESTS) for name, (total, times) in found.items()}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inside", description=__doc__)
    parser.add_argument("--functions", action="store_true", help="by function too, which costs each call a little")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            configure_logging("info", nowhere)
            uvloop.run(serve(REQUESTS))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        total, functions = count(Path(name), by_function=asked.functions)
    print(f"{total:,.1f} k instructions for each invoke")
    for name, (spent, calls) in sorted(functions.items(), key=lambda item: -item[1][0])[:SHOWN]:
        function, _, file = name.removeprefix("py::").partition(":")
        place = file.removeprefix(f"{ROOT}/").rpartition("site-packages/")[-1]
        print(f"{spent:9.1f} k {calls:6.2f} calls  {place}: {function}")


if __name__ == "__main__":
    main()
