"""Measures what a running proxy holds on to: under readers that stop, clients that leave, crowds, and at its end.

Prints a table for docs/streaming.md. Starts a real proxy before an upstream of its own; sends nothing off this machine.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.front import proxy_before
from tests.support.principals import Principals
from tests.support.proxy import Proxy
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, answer, chunk

LINE = b'{"event":"message","text":"' + b"x" * 480 + b'"}\n'
BLOCK = chunk(LINE * 128)
MIB = 1 << 20
SLOTS = 20_000
"""Runs that one caller may have at once: all of them, but each is counted and must be given back."""


async def talk(line: Line) -> None:
    """Do what the prompt says: so many MiB at once, a line every so often, a wait; or answer at once."""
    while request := await line.request():
        body = request.partition(b"\r\n\r\n")[2]
        if b"[flood " in body:
            await line.write(CHUNKED_HEAD)
            for _ in range(int(body.split(b"[flood ")[1].split(b"]")[0]) * MIB // len(BLOCK)):
                await line.write(BLOCK)
            await line.write(LAST_CHUNK)
        elif b"[drip]" in body:
            await line.write(CHUNKED_HEAD)
            gone = asyncio.ensure_future(line.gone())
            while not gone.done():
                await line.write(chunk(LINE))
                await asyncio.wait([gone], timeout=1)
            return
        elif b"[wait]" in body:
            await asyncio.sleep(0.05)
            await line.write(answer(b"{}"))
        else:
            await line.write(answer(b"{}"))


@dataclass(slots=True)
class Subject:
    """A running proxy, seen from outside."""

    proxy: Proxy
    token: str

    @property
    def pid(self) -> int:
        """Its process."""
        return self.proxy.process.pid

    def memory(self) -> int:
        """Bytes that are resident."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """How many are open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        host, _, port = self.proxy.url.removeprefix("http://").partition(":")
        return await asyncio.open_connection(host, int(port), limit=4096)

    def request(self, text: str, *, path: str = "/agent/stream", accept: str = "*/*") -> bytes:
        """Write a run's request."""
        body = json.dumps({"text": text}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {self.token}\r\naccept: {accept}\r\n"
        return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    async def is_served(self) -> float:
        """Give the seconds that an invoke on a new connection takes. Raises OSError or TimeoutError."""
        began = time.monotonic()
        await self._invoked()
        return time.monotonic() - began

    async def slots_free(self) -> int:
        """Give how many more runs the caller might have had at once beside one that is being asked for."""
        found = re.search(rb'"concurrency";r=(\d+)', await self._invoked())
        return int(found[1]) if found is not None else 0

    async def _invoked(self) -> bytes:
        """Give the head of an invoke's answer, on a new connection. Raises OSError or TimeoutError."""
        async with asyncio.timeout(10):
            reader, writer = await self.connect()
            writer.write(self.request("hi", path="/agent/invoke"))
            head = await reader.readuntil(b"\r\n\r\n")
            writer.close()
        if not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(head[:40])
        return head

    async def come_to(self, descriptors: int, seconds: float = 20) -> bool:
        """Wait until no more than so many descriptors are open."""
        limit = time.monotonic() + seconds
        while self.descriptors() > descriptors and time.monotonic() < limit:  # noqa: ASYNC110  another process
            await asyncio.sleep(0.05)
        return self.descriptors() <= descriptors


@asynccontextmanager
async def subject(directory: Path, **environment: str) -> AsyncIterator[Subject]:
    """Run a proxy, warmed up."""
    principals = Principals()
    settings = {"PROXY_RATE_LIMIT": "off", "PROXY_CONCURRENCY_LIMIT": str(SLOTS), "PROXY_POOL_IDLE_SECONDS": "0.5"}
    async with proxy_before(talk, directory, principals, **settings, **environment) as (proxy, _):
        one = Subject(proxy, principals.token("alice"))
        for _ in range(20):
            await one.is_served()
        await asyncio.sleep(1)  # idle connections go
        yield one


async def slow_readers(one: Subject, *, count: int, megabytes: int, accept: str = "*/*") -> dict[str, float]:
    """Let clients stop reading a large stream, and give what the memory grew by, in MiB; then read one to its end."""
    before, writers = one.memory(), []
    for _ in range(count):
        reader, writer = await one.connect()
        writer.write(one.request(f"[flood {megabytes}]", accept=accept))
        await reader.readuntil(b"\r\n\r\n")
        writers.append((reader, writer))
    most, quiet = 0, 0
    while quiet < 10:  # until it has not grown for a while
        await asyncio.sleep(0.1)
        grown = one.memory() - before
        quiet = 0 if grown > most else quiet + 1
        most = max(most, grown)
    served = await one.is_served()
    total = 0
    while data := await writers[0][0].read(1 << 20):
        total += len(data)
        if data.endswith(b"0\r\n\r\n"):
            break
    for _, writer in writers:
        writer.transport.abort()
    return {"grown_mib": most / MIB, "served_s": served, "one_read_mib": total / MIB}


async def cancellations(one: Subject, *, count: int, at_once: int, seed: int = 1) -> dict[str, float]:
    """Let clients leave at random moments, by FIN or RST; give what stays open, and what the memory grew by."""
    choice = random.Random(seed)  # noqa: S311  when to leave is no secret
    descriptors, gate = one.descriptors(), asyncio.Semaphore(at_once)

    async def leave() -> None:
        async with gate:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await one.connect()
                path = choice.choice(("/agent/stream", "/agent/stream", "/agent/invoke"))
                text = "[wait]" if path.endswith("invoke") else "[drip]"
                request = one.request(text, path=path, accept=choice.choice(("*/*", "text/event-stream")))
                moment = choice.randrange(5)
                writer.write(request[: choice.randrange(1, len(request))] if moment == 0 else request)
                if moment > 1:
                    await asyncio.sleep(choice.random() * 0.02)
                if moment == 4:
                    await reader.readuntil(b"\r\n\r\n")
                writer.transport.abort() if choice.random() < 0.5 else writer.close()

    await asyncio.gather(*(leave() for _ in range(count // 4)))
    await one.come_to(descriptors)
    before = one.memory()
    await asyncio.gather(*(leave() for _ in range(count - count // 4)))
    same = await one.come_to(descriptors)
    slots = await one.slots_free()
    left = one.descriptors() - descriptors if not same else 0
    return {
        "left": count,
        "descriptors_more": left,
        "slots_lost": SLOTS - 1 - slots,
        "grown_mib": (one.memory() - before) / MIB,
    }


async def crowd(one: Subject, *, idle: int, streams: int) -> dict[str, float]:
    """Hold idle connections and live streams at once, and give what an invoke takes beside them."""
    before = one.memory()
    held = [await one.connect() for _ in range(idle)]
    with_idle = one.memory()
    for _ in range(streams):
        reader, writer = await one.connect()
        writer.write(one.request("[drip]"))
        held.append((reader, writer))
    alive = 0
    for reader, _ in held[idle:]:
        async with asyncio.timeout(30):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"\n")
            alive += 1
    served = max([await one.is_served() for _ in range(20)])
    figures = {
        "idle": idle,
        "streams": alive,
        "idle_kib_each": (with_idle - before) / 1024 / max(1, idle),
        "stream_kib_each": (one.memory() - with_idle) / 1024 / max(1, streams),
        "slowest_of_20_s": served,
    }
    for _, writer in held:
        writer.transport.abort()
    return figures


async def exhaustion(one: Subject, *, most: int) -> dict[str, float]:
    """Take every descriptor, and see that a running stream goes on, and that the rest is served again after it."""
    reader, writer = await one.connect()
    writer.write(one.request("[drip]"))
    await reader.readuntil(b"\n")
    hard = resource.prlimit(one.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, (most, hard))
    held = [await one.connect() for _ in range(most)]
    await asyncio.sleep(1)
    async with asyncio.timeout(10):
        for _ in range(3):  # lines that were written after nothing was left
            await reader.readuntil(b"}")
    for _, each in held:
        each.transport.abort()
    writer.transport.abort()
    await asyncio.sleep(1)
    return {"most": most, "served_s": await one.is_served()}


async def drain(one: Subject, *, streams: int, grace: float) -> dict[str, float]:
    """Send SIGTERM under live streams of events, and give when the process ended, and how many heard why."""
    held = []
    for _ in range(streams):
        reader, writer = await one.connect()
        writer.write(one.request("[drip]", accept="text/event-stream"))
        await reader.readuntil(b"\n\n")
        held.append((reader, writer))
    began = time.monotonic()
    one.proxy.process.send_signal(signal.SIGTERM)
    told = 0
    for reader, writer in held:
        rest = b""
        while data := await reader.read(1 << 16):
            rest += data
        told += b"retry: 1000" in rest and rest.endswith(b"0\r\n\r\n")
        writer.close()
    status = await asyncio.to_thread(one.proxy.process.wait, 60)
    return {
        "streams": streams,
        "told": told,
        "grace_s": grace,
        "ended_after_s": time.monotonic() - began,
        "status": status,
    }


async def measure(directory: Path) -> list[tuple[str, dict[str, float]]]:
    """Measure everything, at full size."""
    rows = []
    async with subject(directory) as one:
        rows.append(("20 readers that stop, 200 MB each, lines", await slow_readers(one, count=20, megabytes=200)))
        events = await slow_readers(one, count=20, megabytes=200, accept="text/event-stream")
        rows.append(("20 readers that stop, 200 MB each, events", events))
    async with subject(directory) as one:
        rows.append(("8,000 clients that leave", await cancellations(one, count=8000, at_once=100)))
    async with subject(directory) as one:
        rows.append(("10,000 idle connections, 1,000 streams", await crowd(one, idle=10_000, streams=1000)))
    async with subject(directory) as one:
        rows.append(("every descriptor taken", await exhaustion(one, most=200)))
    async with subject(directory, PROXY_GRACE_SECONDS="3") as one:
        rows.append(("SIGTERM under 200 streams", await drain(one, streams=200, grace=3)))
    return rows


def main() -> int:
    """Print the table."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="endurance-") as name:
        for title, figures in asyncio.run(measure(Path(name))):
            told = ", ".join(f"{key} {value:,.{0 if value == int(value) else 3}f}" for key, value in figures.items())
            print(f"| {title} | {told} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
