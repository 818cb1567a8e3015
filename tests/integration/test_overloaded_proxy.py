"""A proxy with too much to do, as a process with open sockets: who is refused, who is not, and what goes on.

Nobody sleeps until something is so; windows are days, so that none turns while a test counts.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx

from tests.security.wire import Answer, exchange, head
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, answer, chunk, raw_upstream

SECRET = "s" * 48
TIERS = ("bronze", "default", "gold")


@asynccontextmanager
async def house(directory: Path, done: asyncio.Event, **environment: str) -> AsyncIterator[tuple[Proxy, Principals]]:
    """Run a proxy before an upstream whose streams end when `done` is set."""
    principals = Principals()

    async def talk(line: Line) -> None:
        while request := await line.request():
            if b"/stream" in request.split(b"\r\n")[0]:
                await line.write(CHUNKED_HEAD + chunk(b'{"n":1}\n'))
                await done.wait()
                await line.write(chunk(b'{"n":2}\n') + LAST_CHUNK)
            else:
                await line.write(answer(b"{}", "content-type: application/json"))

    settings = {"PROXY_RATE_LIMIT": "1000/day", "PROXY_TIERS": ",".join(TIERS), **principals.environment()}
    async with raw_upstream(talk) as upstream:
        proxy = await asyncio.to_thread(start_proxy, directory, upstream.url, SECRET, **settings, **environment)
        try:
            yield proxy, principals
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)


def ask_without_a_body(proxy: Proxy, principals: Principals, tier: str, path: str = "/agent/stream") -> Answer:
    """Announce a body and never send it: whoever answers has not read it."""
    fields = [("Content-Length", "100"), ("Content-Type", "application/json")]
    token = principals.token("alice", tier=tier)
    return exchange(proxy.url, head("POST", path, ("Authorization", f"Bearer {token}"), *fields))


async def test_the_lowest_tier_is_refused_first_and_what_runs_goes_on(tmp_path: Path) -> None:
    """Of forty runs bronze may open 32, default 36 and gold all; then each stream ends whole and all may again."""
    done = asyncio.Event()
    async with (
        house(tmp_path, done, PROXY_MAX_OPEN_RUNS="40") as (proxy, principals),
        httpx.AsyncClient(base_url=proxy.url, timeout=30) as client,
        AsyncExitStack() as streams,
    ):
        opened: list[httpx.Response] = []

        async def open_stream(tier: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {principals.token('alice', tier=tier)}"}
            stream = client.stream("POST", "/agent/stream", json={"text": "hi"}, headers=headers)
            response = await streams.enter_async_context(stream)
            if response.status_code == 200:
                opened.append(response)
            return response

        admitted = {}
        for tier in TIERS:
            while (response := await open_stream(tier)).status_code == 200:
                pass
            admitted[tier] = len(opened)
            assert response.status_code == 503
        unread = await asyncio.to_thread(ask_without_a_body, proxy, principals, "gold")
        listing = await client.get("/agent/ping", headers={"Authorization": f"Bearer {principals.token('bob')}"})
        stopped = await client.post(
            "/agent/v1/graph/stop",
            json={"thread_id": "t"},
            headers={"Authorization": f"Bearer {principals.token('alice', tier='bronze')}"},
        )
        healthy = [(await client.get(f"/health/{path}")).status_code for path in ("live", "ready")]
        done.set()
        bodies = [await response.aread() for response in opened]
        again = await open_stream("bronze")
        await again.aread()
        line = await asyncio.to_thread(proxy.line_of, code="reduced_capacity")

    assert admitted == {"bronze": 32, "default": 36, "gold": 40}
    assert bodies == [b'{"n":1}\n{"n":2}\n'] * 40
    assert (unread.status, unread.values("retry-after")) == (503, ["1"])
    assert unread.problem()["code"] == "reduced_capacity"
    assert (listing.status_code, listing.headers["retry-after"]) == (503, "2")
    assert stopped.status_code == 200
    assert healthy == [200, 200]
    # Forty streams, one stop and the last stream: what was refused was not charged.
    assert re.fullmatch(r'"requests";r=958;t=\d+', again.headers["ratelimit"])
    assert (line["status"], line["reason"]) == (503, "open runs")
    assert [line["event"] for line in proxy.log_lines()].count("overload.began") == 1


async def test_a_proxy_that_is_late_refuses_until_it_has_caught_up(tmp_path: Path) -> None:
    """A process that was held gets its loop's turns too late: new work waits, health does not, and then it is over."""
    async with (
        house(tmp_path, asyncio.Event(), PROXY_MAX_LOOP_LAG_SECONDS="0.05") as (proxy, principals),
        httpx.AsyncClient(base_url=proxy.url, timeout=30) as client,
    ):
        headers = {"Authorization": f"Bearer {principals.token('alice', tier='gold')}"}
        async with asyncio.timeout(60):
            while (await client.get("/agent/ping", headers=headers)).status_code != 503:
                proxy.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.6)
                proxy.process.send_signal(signal.SIGCONT)
                health = await client.get("/health/live")
            while (await client.get("/agent/ping", headers=headers)).status_code != 200:
                await asyncio.sleep(0.02)
        line = await asyncio.to_thread(proxy.line_of, code="reduced_capacity")

    assert health.status_code == 200
    assert line["reason"] == "loop lag"


async def test_an_invoke_whose_client_left_is_open_until_upstream_ends(tmp_path: Path) -> None:
    """Hanging up makes no room: the run goes on, and is counted, until the sidecar has answered it."""
    begun, done = asyncio.Event(), asyncio.Event()

    async def talk(line: Line) -> None:
        while request := await line.request():
            if b"/invoke" in request.split(b"\r\n")[0]:
                begun.set()
                await done.wait()
            await line.write(answer(b"{}", "content-type: application/json"))

    principals = Principals()
    environment = {**principals.environment(), "PROXY_RATE_LIMIT": "off", "PROXY_MAX_OPEN_RUNS": "1"}
    async with raw_upstream(talk) as upstream:
        proxy = await asyncio.to_thread(start_proxy, tmp_path, upstream.url, SECRET, **environment)
        headers = {"Authorization": f"Bearer {principals.token('alice')}"}
        try:
            async with httpx.AsyncClient(base_url=proxy.url, headers=headers, timeout=10, trust_env=False) as client:
                left = asyncio.create_task(client.post("/agent/invoke", json={"text": "hi"}))
                await asyncio.wait_for(begun.wait(), 10)
                left.cancel()
                await asyncio.to_thread(proxy.line_of, operation="invoke", end="client_left")
                refused = await client.post("/agent/invoke", json={"text": "hi"})
                done.set()
                async with asyncio.timeout(10):
                    while (await client.post("/agent/invoke", json={"text": "hi"})).status_code != 200:
                        await asyncio.sleep(0.01)
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)

    assert (refused.status_code, refused.json()["code"]) == (503, "reduced_capacity")
