"""The end of a process: whom it still tells something, and how long for all of them together."""

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from proxy.background import background
from proxy.model import LAST_SECONDS, Lifecycle
from proxy.server import SETTLE_SECONDS, Server
from proxy.tasks import beside, end
from proxy.telemetry import Telemetry

GRACE = 7


def test_what_is_left_is_never_more_than_the_end_takes() -> None:
    """All of it while no end is set, or one far away; then what remains of it, and nothing afterwards."""
    assert Lifecycle().left(0.0) == LAST_SECONDS
    assert [Lifecycle(ends_at=100.0).left(now) for now in (0.0, 99.0, 100.0, 101.0)] == [LAST_SECONDS, 1.0, 0.0, 0.0]


def draining(lifecycle: Lifecycle) -> Server:
    """Make a server that listens nowhere."""
    server = Server(
        uvicorn.Config("nothing:app", timeout_graceful_shutdown=GRACE),
        lifecycle=lifecycle,
        background=lambda: unending([]),
        pool=SimpleNamespace(),  # type: ignore[arg-type]  # never touched
        drain_delay=0,
    )
    server.servers = []
    return server


async def test_a_second_signal_is_not_taken_back_when_the_port_closes() -> None:
    """It may come while the first one's delay goes on."""
    lifecycle = Lifecycle()
    server = draining(lifecycle)
    server.drain()
    server.drain()
    ends_at = lifecycle.ends_at
    for _ in range(5):  # the port closes in one of these turns
        await asyncio.sleep(0.001)

    assert lifecycle.ends_at == ends_at < asyncio.get_running_loop().time() + LAST_SECONDS


async def test_a_drain_sets_one_end_for_all_that_is_waited_for() -> None:
    """The grace and what the end takes, from the moment at which the port closes; asked again, no grace."""
    lifecycle = Lifecycle()
    server = draining(lifecycle)
    loop = asyncio.get_running_loop()
    began = loop.time()
    server.drain()
    assert lifecycle.ends_at == math.inf
    while lifecycle.ends_at == math.inf:
        await asyncio.sleep(0)
    ends_at = lifecycle.ends_at
    server.drain()

    assert began + GRACE + LAST_SECONDS <= ends_at <= loop.time() + GRACE + LAST_SECONDS
    assert lifecycle.ends_at <= ends_at - GRACE + (loop.time() - began)
    assert SETTLE_SECONDS[1] < LAST_SECONDS / 2


class Part:
    """A part whose end waits for somebody who never answers."""

    def __init__(self, ended: list[str], name: str) -> None:
        self._ended = ended
        self._name = name

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Never end by itself."""
        async with unending(self._ended, self._name):
            yield


@asynccontextmanager
async def unending(ended: list[str], name: str = "") -> AsyncGenerator[None]:
    """Wait at the end for what does not come."""
    try:
        yield
    finally:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)


@pytest.mark.parametrize("fails", [False, True])
async def test_who_does_not_answer_at_the_end_is_cut_off(fails: bool) -> None:
    """Runs are given half of what is left, so that limits can be told what those used; nobody is waited for longer."""
    ended: list[str] = []
    given: dict[str, float] = {}
    lifecycle = Lifecycle()

    async def close_runs(seconds: float) -> None:
        given["runs"] = seconds

    tracer: Any = SimpleNamespace(close=lambda seconds: given.update(traces=seconds))
    parts: dict[str, Any] = {
        "keys": Part(ended, "keys"),
        "store": SimpleNamespace(close=asyncio.Event().wait),
        "limits": Part(ended, "limits"),
        "overload": SimpleNamespace(watching=asynccontextmanager(_nothing)),
        "runs": SimpleNamespace(close=close_runs),
        "telemetry": Telemetry(tracer=tracer),
    }
    settings: Any = SimpleNamespace(redis_url=None)
    loop = asyncio.get_running_loop()

    async def serve() -> None:
        async with background(settings, lifecycle, **parts):
            lifecycle.ends_at = loop.time() + 0.2
            if fails:
                raise TimeoutError("of the server's own")

    async with asyncio.timeout(20):
        if fails:
            with pytest.raises(TimeoutError, match="own"):
                await serve()
        else:
            await serve()

    assert ended == ["limits", "keys"]
    assert 0 < given["runs"] <= 0.1
    assert given["traces"] == 0


async def _nothing() -> AsyncGenerator[None]:
    yield


async def test_who_waits_for_a_task_to_end_can_be_cut_off_too() -> None:
    """His own cancellation is not taken for the task's; the task goes on to its end."""
    goes_on, ended = asyncio.Event(), []

    async def lingering() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await goes_on.wait()
            ended.append(True)

    task = asyncio.create_task(lingering())
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await end(task)
    goes_on.set()
    await asyncio.wait({task})

    assert ended == [True]


async def test_what_a_task_has_raised_is_raised_where_its_context_ends() -> None:
    """No work fails unheard."""

    async def fail() -> None:
        raise LookupError("once")

    with pytest.raises(LookupError, match="once"):
        async with beside(fail()):
            await asyncio.sleep(0)
            await asyncio.sleep(0)


def test_a_database_file_that_is_let_go_half_closed_holds_no_process_up(tmp_path: Path) -> None:
    """Each connection has a thread of its own, which nobody tells to stop when the end is cut short."""
    script = f"""
import asyncio
import sqlalchemy
from proxy.keystore import SqlKeyStore

async def main():
    store = SqlKeyStore("sqlite+aiosqlite:///{tmp_path}/keys.db")
    async def ask():
        async with store._engine.begin() as connection:
            await connection.execute(sqlalchemy.text("SELECT 1"))
            await asyncio.sleep(0.1)
    await asyncio.gather(ask(), ask(), ask())
    try:
        async with asyncio.timeout(0):
            await store.close()
    except TimeoutError:
        print("cut short", flush=True)

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False, timeout=30
    )

    assert (done.stdout, done.returncode) == ("cut short\n", 0), done.stderr
