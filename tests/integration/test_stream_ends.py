"""How an answer ends when the sidecar, the client or the proxy itself goes away: real processes, real sockets."""

import asyncio
import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import jwt
import pytest

from tests.support.agent import start_agent
from tests.support.agent import stop as stop_agent
from tests.support.events import parse_events
from tests.support.front import EVENTS, RUN, SECRET, client_of, ended, proxy_before
from tests.support.principals import Principals
from tests.support.provider import stand_in
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, answer, chunk, raw_upstream


@pytest.fixture(scope="module")
def principals() -> Principals:
    """Give somebody who may call."""
    return Principals()


async def test_each_event_arrives_before_the_next_is_written(tmp_path: Path, principals: Principals) -> None:
    """Upstream writes an event only after the client has read the one before; nothing is held back."""
    seen = asyncio.Semaphore(0)

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(CHUNKED_HEAD)
        for number in range(50):
            await line.write(chunk(b'{"n":%d}\n' % number))
            await seen.acquire()
        await line.write(LAST_CHUNK)

    async with proxy_before(talk, tmp_path, principals) as (proxy, _), client_of(proxy, principals) as client:
        received = []
        async with asyncio.timeout(20), client.stream("POST", "/agent/stream", json=RUN) as response:
            async for part in response.aiter_raw():
                received.append(part)
                seen.release()

        assert received == [b'{"n":%d}\n' % number for number in range(50)]
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert (await ended(proxy, "stream"))["end"] == "done"


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_an_upstream_that_is_cut_off_leaves_the_client_a_cut_answer(
    tmp_path: Path, principals: Principals, how: str
) -> None:
    """What came before is delivered, and the body does not end as a whole one does."""
    go = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(CHUNKED_HEAD + chunk(b"part"))
        await go.wait()
        if how == "rst":
            line.reset()

    async with proxy_before(talk, tmp_path, principals) as (proxy, _), client_of(proxy, principals) as client:
        parts = []
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            async with client.stream("POST", "/agent/stream", json=RUN) as response:
                async for part in response.aiter_raw():
                    parts.append(part)
                    go.set()
        line = await ended(proxy, "stream")

        assert parts == [b"part"]
        assert (line["end"], line["fault"], line["status"]) == ("upstream_cut", "upstream", 200)


async def test_a_cut_answer_with_a_length_is_cut_too(tmp_path: Path, principals: Principals) -> None:
    """An invoke's answer that stops short is not passed off as a whole one."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 50)

    async with proxy_before(talk, tmp_path, principals) as (proxy, _), client_of(proxy, principals) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/agent/invoke", json=RUN)

        assert (await ended(proxy, "invoke"))["end"] == "upstream_cut"


async def test_a_client_that_hangs_up_closes_upstream(tmp_path: Path, principals: Principals) -> None:
    """The sidecar's connection is closed when the client's is, while nothing at all flows."""
    gone = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(CHUNKED_HEAD + chunk(b"part"))
        await line.gone()
        gone.set()

    async with proxy_before(talk, tmp_path, principals) as (proxy, _), client_of(proxy, principals) as client:
        async with client.stream("POST", "/agent/stream", json=RUN) as response:
            await anext(response.aiter_raw())
        async with asyncio.timeout(5):
            await gone.wait()

        assert (await ended(proxy, "stream"))["end"] == "client_left"


async def test_a_sidecar_that_is_down_is_a_502(tmp_path: Path, principals: Principals) -> None:
    """Nobody listens: the caller is told at once, in our words."""

    async def talk(line: Line) -> None:
        await line.request()

    async with raw_upstream(talk) as upstream:
        url = upstream.url
    proxy = start_proxy(tmp_path, url, SECRET, **principals.environment())
    try:
        async with client_of(proxy, principals) as client:
            response = await client.post("/agent/invoke", json=RUN)

        assert response.status_code == 502
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "upstream_unreachable"
    finally:
        stop_proxy(proxy.process)


async def test_a_sidecar_that_does_not_answer_is_a_504(tmp_path: Path, principals: Principals) -> None:
    """The first byte has a deadline."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.gone()

    async with (
        proxy_before(talk, tmp_path, principals, PROXY_FIRST_BYTE_TIMEOUT_SECONDS="0.2") as (proxy, _),
        client_of(proxy, principals) as client,
    ):
        response = await client.post("/agent/invoke", json=RUN)

        assert response.status_code == 504
        assert response.json()["code"] == "upstream_deadline"


async def test_a_sidecar_that_accepts_nobody_is_a_504_in_either_form(tmp_path: Path, principals: Principals) -> None:
    """Its queue is full, so that the system leaves whoever knocks waiting: connecting has a deadline of its own."""
    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())  # all that there is room for
        url = "http://{}:{}".format(*listener.getsockname())
        hasty = {"PROXY_CONNECT_TIMEOUT_SECONDS": "0.1", **principals.environment()}
        proxy = await asyncio.to_thread(start_proxy, tmp_path, url, SECRET, **hasty)
        try:
            async with client_of(proxy, principals) as client:
                answers = [
                    await client.post("/agent/invoke", json=RUN),
                    await client.post("/agent/stream", json=RUN),
                    await client.post("/agent/stream", json=RUN, headers=EVENTS),
                ]
            lines = [await ended(proxy, "stream", end="connect_deadline"), await ended(proxy, "invoke")]
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)

    assert [(each.status_code, each.json()["code"]) for each in answers] == [(504, "upstream_deadline")] * 3
    assert [(line["end"], line["fault"]) for line in lines] == [("connect_deadline", "upstream")] * 2


async def test_a_dirty_answer_never_reaches_another_caller(tmp_path: Path, principals: Principals) -> None:
    """Two callers in turn, and an upstream that writes two answers to the first."""

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(answer(b"first") + answer(b"of somebody else"))

    async with proxy_before(talk, tmp_path, principals) as (proxy, upstream), client_of(proxy, principals) as client:
        bodies = [(await client.post("/agent/invoke", json=RUN)).content for _ in range(4)]

        assert bodies == [b"first"] * 4
        assert upstream.accepted == 4


async def test_sigterm_lets_a_running_stream_finish(tmp_path: Path, principals: Principals) -> None:
    """No new work is taken, what runs goes on to its end, and the status is 0."""
    draining = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(CHUNKED_HEAD + chunk(b"before "))
        await draining.wait()
        await line.write(chunk(b"after") + LAST_CHUNK)

    async with proxy_before(talk, tmp_path, principals) as (proxy, _), client_of(proxy, principals) as client:
        body = b""
        async with client.stream("POST", "/agent/stream", json=RUN) as response:
            async for part in response.aiter_raw():
                body += part
                if not draining.is_set():
                    proxy.process.send_signal(signal.SIGTERM)
                    await until_logged(proxy, "server.draining")
                    with pytest.raises(httpx.TransportError):
                        await refused_when_closed(proxy)
                    draining.set()
        status = await asyncio.to_thread(proxy.process.wait, 10)

        assert body == b"before after"
        assert status == 0


async def test_an_answer_that_was_under_way_at_sigterm_is_its_connections_last(
    tmp_path: Path, principals: Principals
) -> None:
    """It says so, though its request came before: whoever kept the connection would send the next one to nobody."""
    asked, draining = asyncio.Event(), asyncio.Event()

    async def talk(line: Line) -> None:
        while await line.request():
            asked.set()
            await draining.wait()
            await line.write(answer(b"{}"))

    async with proxy_before(talk, tmp_path, principals) as (proxy, _), client_of(proxy, principals) as client:
        running = asyncio.create_task(client.post("/agent/invoke", json=RUN))
        await asked.wait()
        proxy.process.send_signal(signal.SIGTERM)
        await until_logged(proxy, "server.draining")
        draining.set()
        response = await running

    assert (response.status_code, response.headers.get("connection")) == (200, "close")


async def test_sigterm_refuses_nobody_on_a_kept_connection(tmp_path: Path, principals: Principals) -> None:
    """Up to the moment at which idle connections close, whoever asks on one is served."""

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(answer(b"{}"))

    async with proxy_before(talk, tmp_path, principals, PROXY_RATE_LIMIT="off") as (proxy, _), asyncio.timeout(30):
        host, port = proxy.url.removeprefix("http://").split(":")
        asked = f"GET /agent/ping HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer {principals.token('alice')}\r\n\r\n"
        kept = [await asyncio.open_connection(host, int(port)) for _ in range(200)]

        async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
            writer.write(asked.encode())
            try:
                return (await reader.readuntil(b"}"))[:12]
            except asyncio.IncompleteReadError as ended:
                return ended.partial
            except ConnectionError:
                return b""

        told = [await ask(*each) for each in kept]
        proxy.process.send_signal(signal.SIGTERM)
        for each in kept:
            if told[-1]:
                told.append(await ask(*each))
                await asyncio.sleep(0.003)
        for _, writer in kept:
            writer.transport.abort()

        assert set(told[:-1]) == {b"HTTP/1.1 200"}
        assert told[-1] == b""


async def test_the_grace_is_not_endless(tmp_path: Path, principals: Principals) -> None:
    """A stream that outlives the grace is cut, visibly, and the status is still 0."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(CHUNKED_HEAD + chunk(b"before"))
        await line.gone()

    async with (
        proxy_before(talk, tmp_path, principals, PROXY_GRACE_SECONDS="1") as (proxy, _),
        client_of(proxy, principals) as client,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", "/agent/stream", json=RUN) as response:
                async for _ in response.aiter_raw():
                    proxy.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(proxy.process.wait, 10)

        assert status == 0
        assert (await ended(proxy, "stream"))["end"] == "shutdown"


async def until_logged(proxy: Proxy, event: str) -> None:
    """Wait until the proxy has logged `event`."""
    async with asyncio.timeout(10):
        while not any(line.get("event") == event for line in proxy.log_lines()):
            await asyncio.sleep(0.01)


async def refused_when_closed(proxy: Proxy) -> None:
    """Call on new connections until none is accepted; each that still is must be told to go elsewhere."""
    async with asyncio.timeout(10):
        while True:
            async with httpx.AsyncClient() as stranger:
                response = await stranger.get(f"{proxy.url}/health/ready")
            assert response.status_code == 503
            await asyncio.sleep(0.01)


@pytest.fixture
def agent_and_proxy(tmp_path: Path, principals: Principals) -> Iterator[tuple[object, Proxy]]:
    """Run a real sidecar and a proxy before it."""
    agent = start_agent(tmp_path)
    proxy = start_proxy(tmp_path, agent.url, agent.secret, **principals.environment())
    try:
        yield agent, proxy
    finally:
        stop_proxy(proxy.process)
        stop_agent(agent.process)


async def test_a_killed_sidecar_is_a_cut_stream_and_then_a_502(
    agent_and_proxy: tuple[object, Proxy], principals: Principals
) -> None:
    """A real sidecar dies midway: the stream is visibly cut, and the next caller is told."""
    agent, proxy = agent_and_proxy
    async with client_of(proxy, principals) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", "/agent/stream", json={"text": "[words 1000] [pace 50ms]"}) as response:
                async for _ in response.aiter_raw():
                    agent.process.kill()  # type: ignore[attr-defined]
        after = await client.post("/agent/invoke", json=RUN)

    assert response.status_code == 200
    assert after.status_code == 502


async def test_a_graph_that_fails_midway_says_so_in_the_stream(
    agent_and_proxy: tuple[object, Proxy], principals: Principals
) -> None:
    """The sidecar's own error line arrives, and the stream ends whole."""
    _, proxy = agent_and_proxy
    async with client_of(proxy, principals) as client:
        response = await client.post("/agent/stream", json={"text": "[words 10] [fail 3 out of paper]"})
    lines = [json.loads(line) for line in response.text.splitlines()]

    assert response.status_code == 200
    assert [line["event"] for line in lines].count("message") >= 3
    assert lines[-1]["event"] == "error"
    assert "out of paper" not in str([line for line in lines if line["event"] == "error"])
    assert (await ended(proxy, "stream"))["end"] == "upstream_error"


async def test_a_real_agents_stream_comes_as_events(
    agent_and_proxy: tuple[object, Proxy], principals: Principals
) -> None:
    """A whole run and one that fails, with the names that AgentFlow gives its events."""
    _, proxy = agent_and_proxy
    async with client_of(proxy, principals, **EVENTS) as client:
        whole = parse_events((await client.post("/agent/stream", json={"text": "[words 3]"})).content)
        failed = parse_events((await client.post("/agent/stream", json={"text": "[fail 1 out of paper]"})).content)

    assert [event.name for event in whole] == ["message"] * 5 + ["done"]
    assert [event.name for event in failed][-2:] == ["message", "error"]
    assert "out of paper" not in failed[-1].data
    assert json.loads(failed[-1].data)["data"]["code"] == "upstream_error"


async def test_a_client_that_hangs_up_stops_the_real_run(tmp_path: Path, principals: Principals) -> None:
    """Through the proxy and a real sidecar, hanging up reaches the model's provider: no more words are paid for."""
    with stand_in() as provider:
        provider.gate.clear()
        agent = start_agent(
            tmp_path, AGENT_MODEL="openai/stand-in", OPENAI_BASE_URL=provider.url, OPENAI_API_KEY="sk-stand-in"
        )
        proxy = start_proxy(tmp_path, agent.url, agent.secret, **principals.environment())
        try:
            async with client_of(proxy, principals) as client:
                async with client.stream("POST", "/agent/stream", json={"text": "one two"}) as response:
                    lines = response.aiter_lines()
                    await anext(lines)
                    await anext(lines)
                line = await ended(proxy, "stream")
            abandoned = await asyncio.to_thread(provider.abandoned.wait, 20)
        finally:
            stop_proxy(proxy.process)
            stop_agent(agent.process)

    assert line["end"] == "client_left"
    assert abandoned


@pytest.mark.parametrize("operation", ["invoke", "stream"])
async def test_a_client_that_leaves_has_its_run_stopped(tmp_path: Path, principals: Principals, operation: str) -> None:
    """Within a second the sidecar is asked to stop that thread's run, by the same caller; an invoke is read to its end.

    A stream's connection is closed at once. That it is asked to stop too is a setting.
    """
    asked: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
    run: list[bytes] = []
    over = asyncio.Event()

    async def talk(line: Line) -> None:
        request = await line.request()
        if b"/v1/graph/stop" in request:
            asked.set_result([*run, request])
            await line.write(answer(b"{}"))
            return
        run.append(request)
        if operation == "stream":
            await line.write(CHUNKED_HEAD + chunk(b"part"))
            await line.gone()
        else:
            await asyncio.sleep(0.05)
            await asked
            await line.write(answer(b"{}"))
            await line.gone()  # a kept connection, not a closed one
        over.set()

    async with (
        proxy_before(talk, tmp_path, principals, PROXY_STOP_ON_DISCONNECT="true") as (proxy, _),
        client_of(proxy, principals) as client,
    ):
        leaving = asyncio.ensure_future(client.post(f"/agent/{operation}", json={"text": "hi", "thread_id": "t"}))
        while not run:
            await asyncio.sleep(0.01)
        leaving.cancel()
        async with asyncio.timeout(5):
            first, stop = await asked
            await over.wait()
        line = await ended(proxy, operation)

    def identity(request: bytes) -> object:
        token = re.search(rb"authorization: Bearer (\S+)", request)
        assert token is not None
        return jwt.decode(token[1], options={"verify_signature": False})["user_id"]

    thread_id = json.loads(stop.partition(b"\r\n\r\n")[2])["thread_id"]
    assert json.loads(first.partition(b"\r\n\r\n")[2])["config"]["thread_id"] == thread_id
    assert identity(first) == identity(stop)
    assert line["end"] == "client_left"


async def test_runs_that_have_every_connection_are_stopped_when_their_clients_leave(
    tmp_path: Path, principals: Principals
) -> None:
    """Kept until they end, they leave no connection to stop them on; meanwhile whoever asks is told `overloaded`."""
    stopped: set[str] = set()
    begun = 0

    async def talk(line: Line) -> None:
        nonlocal begun
        request = await line.request()
        if b"/v1/graph/stop" in request:
            stopped.add(json.loads(request.partition(b"\r\n\r\n")[2])["thread_id"].partition("~")[2])
            await line.write(answer(b"{}"))
        else:
            begun += 1
        await line.gone()

    environment = {"PROXY_POOL_CONNECTIONS": "2", "PROXY_RATE_LIMIT": "off"}
    async with (
        proxy_before(talk, tmp_path, principals, **environment) as (proxy, _),
        client_of(proxy, principals) as client,
        asyncio.timeout(20),
    ):
        leaving = [asyncio.ensure_future(client.post("/agent/invoke", json=RUN | {"thread_id": name})) for name in "ab"]
        while begun < len(leaving):
            await asyncio.sleep(0.01)
        for each in leaving:
            each.cancel()
        while stopped != {"a", "b"}:
            await asyncio.sleep(0.01)
        response = await client.post("/agent/invoke", json=RUN)
        line = await ended(proxy, "invoke", end="unavailable")
        while len(told := [each for each in proxy.log_lines() if each["event"] == "run.stop_sent"]) < len(leaving):
            await asyncio.sleep(0.01)

    assert [(each["status"], each["reason"]) for each in told] == [(200, "answered")] * 2
    assert (response.status_code, response.json()["code"]) == (503, "overloaded")
    assert response.headers["retry-after"] == "1"
    assert (line["status"], line["code"], line["fault"]) == (503, "overloaded", "proxy")
