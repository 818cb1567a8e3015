"""WebSockets through running processes: who gets in, whose threads are run on, and how they end."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.agent import Agent, ask, start_agent, stop
from tests.support.nginx import BALANCER, CONFIG, Nginx, start_nginx
from tests.support.nginx import stop as stop_nginx
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import Line, raw_upstream

PATH = "/agent/v1/graph/ws"
SECRET = "s" * 48
HELLO = json.dumps({"text": "hi"})
DONE = json.dumps({"event": "updates", "data": {"status": "done"}})

type Handler = Callable[[ServerConnection], Awaitable[None]]


@asynccontextmanager
async def proxied(
    directory: Path, url: str, secret: str = SECRET, **settings: str
) -> AsyncIterator[tuple[Proxy, Principals]]:
    """Run a proxy before the upstream at `url`."""
    principals = Principals()
    principals.key("billing")
    proxy = await asyncio.to_thread(start_proxy, directory, url, secret, **principals.environment(), **settings)
    try:
        yield proxy, principals
    finally:
        await asyncio.to_thread(stop_proxy, proxy.process)


@asynccontextmanager
async def upstream(handler: Handler) -> AsyncIterator[str]:
    """Serve WebSockets with `handler`; give where."""
    async with serve(handler, "127.0.0.1", 0, max_size=None) as server:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())


def dial(proxy: Proxy, principals: Principals, subject: str = "alice", **options: Any) -> connect:
    """Connect as `subject`."""
    headers = {"Authorization": f"Bearer {principals.token(subject)}"}
    return connect(proxy.url.replace("http", "ws", 1) + PATH, additional_headers=headers, proxy=None, **options)


async def closing(client: ClientConnection) -> tuple[int, str]:
    """Wait for the close; give its code and reason."""
    with contextlib.suppress(ConnectionClosed):
        async with asyncio.timeout(15):
            while True:
                await client.recv()
    return client.close_code or 0, client.close_reason or ""


async def run(client: ClientConnection, said: object) -> list[dict[str, Any]]:
    """Ask for a run, and give everything that it says."""
    await client.send(said if isinstance(said, str | bytes) else json.dumps(said))
    heard: list[dict[str, Any]] = []
    while not heard or not (heard[-1]["event"] == "error" or heard[-1]["data"] == {"status": "done"}):
        heard.append(json.loads(await client.recv()))
    return heard


def threads_in(heard: list[dict[str, Any]]) -> set[str]:
    """Give the threads that a run's events name."""
    return {event["thread_id"] for event in heard if event.get("thread_id")}


def text_of(heard: list[dict[str, Any]]) -> str:
    """Give what the agent said at last."""
    last = [event["message"] for event in heard if event["event"] == "message"][-1]
    text: str = last["content"][0]["text"]
    return text


# Before the real sidecar.


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Run a real sidecar."""
    started = start_agent(tmp_path_factory.mktemp("agent"))
    yield started
    stop(started.process)


async def test_runs_are_on_the_callers_threads(agent: Agent, tmp_path: Path) -> None:
    """Two runs on one connection, a new thread for `new`, and what another said is not to be had by any name."""
    async with proxied(tmp_path, agent.url, agent.secret, PROXY_RATE_LIMIT="off") as (proxy, principals):
        async with dial(proxy, principals) as alice:
            first = await run(alice, ask("the kettle is blue", "diary"))
            again = await run(alice, {"text": "[recall]", "thread_id": "diary"})
            fresh = await run(alice, ask("[recall]", "new"))
        (thread,) = threads_in(first)
        async with dial(proxy, principals, "mallory") as mallory:
            by_name = await run(mallory, ask("[recall]", "diary"))
            refused = [
                await run(mallory, said)
                for said in (
                    ask("[recall]", thread),
                    {"text": "[recall]", "thread_id": f" {thread}\n"},
                    {"invoke_type": "resume", "tool_result": ask("x")["messages"], "config": {"thread_id": thread}},
                    json.dumps(ask("[recall]", thread)).encode(),
                    json.dumps(ask("x", "mine")).replace('"mine"', f'"mine", "thread_id": "{thread}"'),
                )
            ]
            steering = await run(mallory, ask("x") | {"config": {"user_id": "alice"}})
            still = await run(mallory, ask("hi", "diary"))

    assert thread.endswith("~diary")
    assert text_of(again) == "the kettle is blue"
    assert text_of(fresh) == text_of(by_name) == "Nothing was said before."
    assert threads_in(again) == {thread}
    assert thread not in threads_in(by_name) | threads_in(fresh)
    assert [heard[0]["data"]["code"] for heard in refused] == ["not_found"] * 5
    assert [len(heard) for heard in refused] == [1] * 5
    assert steering[0]["data"]["code"] == "invalid_body"
    assert "kettle" not in text_of(still)


@asynccontextmanager
async def before(directory: Path, url: str, deployed: Path = CONFIG) -> AsyncIterator[Nginx]:
    """Run an nginx before `url`."""
    await asyncio.to_thread(directory.mkdir)
    nginx = await asyncio.to_thread(start_nginx, directory, url, deployed=deployed)
    try:
        yield nginx
    finally:
        await asyncio.to_thread(stop_nginx, nginx)


async def test_through_both_nginx(agent: Agent, tmp_path: Path) -> None:
    """The edge hands on this upgrade, with a browser's way to present a token, and no other; the balancer too."""
    async with (
        before(tmp_path / "balancer", agent.url, BALANCER) as balancer,
        proxied(tmp_path, balancer.url, agent.secret) as (proxy, principals),
        before(tmp_path / "edge", proxy.url) as nginx,
    ):
        offered = ["agentflow-bearer", principals.token("alice")]
        address = f"ws://{nginx.host}:{nginx.port}"
        async with connect(address + PATH, subprotocols=offered, proxy=None) as client:  # type: ignore[arg-type]
            assert client.subprotocol == "agentflow-bearer"
            heard = await run(client, {"text": "hello"})
        for path in ("/agent/v1/threads", "/agent/v1/graph/live"):
            with pytest.raises(InvalidStatus) as refused:
                await connect(address + path, subprotocols=offered, proxy=None)  # type: ignore[arg-type]
            assert refused.value.response.status_code == 401  # a request like any other, without a credential

    assert text_of(heard) == "You said: hello"


async def test_a_run_whose_client_left_is_stopped_and_each_run_is_counted(agent: Agent, tmp_path: Path) -> None:
    """Left alone it would go on until it has something to say; two that ended count as two, the third as left."""
    settings = {"PROXY_METRICS_PORT": "0", "PROXY_RATE_LIMIT": "off"}
    mark = f"00-{'c' * 32}-00f067aa0ba902b7-01"
    async with proxied(tmp_path, agent.url, agent.secret, **settings) as (proxy, principals):
        headers = {"Authorization": f"Bearer {principals.token('alice')}", "traceparent": mark}
        client = await connect(proxy.url.replace("http", "ws", 1) + PATH, additional_headers=headers, proxy=None)
        heard = [await run(client, {"text": text, "thread_id": "left"}) for text in ("one two", "three")]
        await client.send(json.dumps({"text": "[wait 60s] never said", "thread_id": "left"}))
        await client.recv()
        during = await counted(proxy)
        client.transport.abort()
        line = await asyncio.to_thread(proxy.line_of, operation="ws", end="client_left")
        while not (stops := [each for each in proxy.log_lines() if each["event"] == "run.stop_sent"]):
            await asyncio.sleep(0.02)
        after = await counted(proxy)

    assert (stops[0]["status"], stops[0]["request_id"]) == (200, line["request_id"])
    assert during['runs_in_flight{operation="ws"}'] == 1
    assert after['runs_in_flight{operation="ws"}'] == 0
    assert after['runs_total{end="done",operation="ws"}'] == 2
    assert after['runs_total{end="client_left",operation="ws"}'] == 1
    assert after['turns_total{operation="ws"}'] == 2
    reported = 'model_tokens_total{direction="output",estimated="false",operation="ws"}'
    assert after[reported] == sum(used_by(each) for each in heard)


async def counted(proxy: Proxy) -> dict[str, float]:
    """Give the numbers that the proxy tells, by name and labels."""
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(proxy.metrics_url)).text
    lines = [line.removeprefix("agent_proxy_").rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


def used_by(heard: list[dict[str, Any]]) -> int:
    """Give the tokens of the answer that a run's events report."""
    usages = [event["message"]["usages"] for event in heard if event["event"] == "message"]
    return int([usage for usage in usages if usage][-1]["completion_tokens"])


# Before an upstream of our own.


async def echo(connection: ServerConnection) -> None:
    """Say everything back, and that the run is done."""
    async for said in connection:
        await connection.send(said)
        await connection.send(DONE)


REFUSED: dict[str, tuple[dict[str, str], list[str], int]] = {
    "nothing": ({}, [], 401),
    "a foreign token": ({}, ["agentflow-bearer", "abc.def.ghi"], 401),
    "half an offer": ({}, ["agentflow-bearer"], 401),
    "another order": ({}, ["TOKEN", "agentflow-bearer"], 401),
    "another name": ({}, ["bearer", "TOKEN"], 401),
    "too much": ({}, ["agentflow-bearer", "TOKEN", "TOKEN"], 400),
    "both ways": ({"Authorization": "Bearer TOKEN"}, ["agentflow-bearer", "TOKEN"], 400),
    "a key and an offer": ({"X-API-Key": "afp_x"}, ["agentflow-bearer", "TOKEN"], 400),
    "basic": ({"Authorization": "Basic YTpi"}, [], 400),
    "a cookie": ({"Cookie": "access_token=TOKEN", "Origin": "https://evil.test"}, [], 401),
    "too narrow": ({}, ["agentflow-bearer", "NARROW"], 403),
}


async def test_who_is_not_let_in_is_answered_before_anything_opens(tmp_path: Path) -> None:
    """A handshake gets the answers of any request, and the sidecar hears of none of them."""
    opened = 0

    async def count(connection: ServerConnection) -> None:
        nonlocal opened
        opened += 1

    async with upstream(count) as url, proxied(tmp_path, url) as (proxy, principals):
        texts = {"TOKEN": principals.token("alice"), "NARROW": principals.token("alice", scope="agent:invoke")}

        def meant(text: str) -> str:
            for name, token in texts.items():
                text = text.replace(name, token)
            return text

        address = proxy.url.replace("http", "ws", 1) + PATH
        for name, (headers, offered, status) in REFUSED.items():
            fields = {field: meant(value) for field, value in headers.items()}
            protocols: Any = [meant(each) for each in offered] or None
            with pytest.raises(InvalidStatus) as refused:
                await connect(address, additional_headers=fields, subprotocols=protocols, proxy=None)
            problem = json.loads(refused.value.response.body or b"{}")
            assert (name, refused.value.response.status_code, problem["status"]) == (name, status, status)
            assert refused.value.response.headers["x-request-id"] == problem["request_id"]
        query = f"?token={texts['TOKEN']}&access_token={texts['TOKEN']}"
        with pytest.raises(InvalidStatus) as refused:
            await connect(address + query, proxy=None)
        assert refused.value.response.status_code == 401
        log = proxy.log.read_text()

    assert opened == 0
    assert not [token for token in texts.values() if token in log]


async def test_a_request_without_a_handshake_is_told_so(tmp_path: Path) -> None:
    """426 for who may, whatever is missing of the handshake; 401 for who may not."""
    async with upstream(echo) as url, proxied(tmp_path, url) as (proxy, principals):
        host, _, port = proxy.url.removeprefix("http://").partition(":")
        statuses = []
        for fields in (
            [],
            ["Connection: Upgrade", "Upgrade: websocket"],
            ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 8", f"Sec-WebSocket-Key: {'A' * 24}"],
            ["Connection: Upgrade", "Upgrade: h2c", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 24}"],
        ):
            for credential in ([], [f"Authorization: Bearer {principals.token('alice')}"]):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write("\r\n".join([f"GET {PATH} HTTP/1.1", "Host: a", *credential, *fields, "", ""]).encode())
                statuses.append(int((await reader.readline()).split()[1]))
                writer.close()

    assert statuses == [401, 426] * 4


async def test_text_and_bytes_go_up_and_down_as_they_are(tmp_path: Path) -> None:
    """What is text stays text, what is bytes stays bytes, up to the largest; pings are answered."""

    async def both(connection: ServerConnection) -> None:
        async for said in connection:
            await connection.send(b"\x00\xff" if isinstance(said, bytes) else "x" * 3_000_000)

    async with (
        upstream(both) as url,
        proxied(tmp_path, url) as (proxy, principals),
        dial(proxy, principals, max_size=None) as client,
    ):
        await client.send(HELLO)
        text = await client.recv()
        await client.send(HELLO.encode())
        data = await client.recv()
        await asyncio.wait_for(await client.ping(), 10)

    assert (text, data) == ("x" * 3_000_000, b"\x00\xff")


@pytest.mark.parametrize(
    ("code", "reason"), [(1000, ""), (1005, ""), (1008, "not here"), (4321, "bye"), (1011, "failed")]
)
async def test_close_codes_cross_both_ways(tmp_path: Path, code: int, reason: str) -> None:
    """Each end sees the code and the reason that the other gave; 1005 stands for a close without (RFC 6455 §7.1.5)."""
    written: Any = code if code != 1005 else None
    seen: list[tuple[int | None, str | None]] = []
    heard = asyncio.Event()

    async def handler(connection: ServerConnection) -> None:
        if await connection.recv() == "":
            return
        await connection.send(DONE)
        with contextlib.suppress(ConnectionClosed):
            await connection.recv()
            await connection.close(written, reason)
        seen.append((connection.close_code, connection.close_reason))
        heard.set()

    async with upstream(handler) as url, proxied(tmp_path, url) as (proxy, principals):
        async with dial(proxy, principals) as client:
            await client.send(HELLO)
            await client.recv()
            await client.send(HELLO)
            down = await closing(client)
        async with dial(proxy, principals) as client:
            heard.clear()
            await client.send(HELLO)
            await client.recv()
            await client.close(written, reason)
            await asyncio.wait_for(heard.wait(), 10)
        line = await asyncio.to_thread(proxy.line_of, operation="ws", status=101)

    assert down == (code, reason)
    assert seen[-1] == (code, reason)
    assert (line["end"], line["path"]) == ("done", PATH)


async def test_a_client_that_leaves_without_a_word_closes_the_sidecars_end(tmp_path: Path) -> None:
    """Within a second upstream is told that it went away."""
    seen = asyncio.get_running_loop().create_future()

    async def handler(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(DONE)
        with contextlib.suppress(ConnectionClosed):
            await connection.recv()
        seen.set_result(connection.close_code)

    async with upstream(handler) as url, proxied(tmp_path, url) as (proxy, principals):
        client = await dial(proxy, principals)
        await client.send(HELLO)
        await client.recv()
        client.transport.abort()
        code = await asyncio.wait_for(seen, 10)
        line = await asyncio.to_thread(proxy.line_of, operation="ws", end="client_left")

    assert (code, line["status"]) == (1001, 101)


async def test_connections_and_runs_are_counted(tmp_path: Path) -> None:
    """A connection and two runs spend three: another run is refused with when to come back, as is a connection."""
    async with (
        upstream(echo) as url,
        proxied(tmp_path, url, PROXY_RATE_LIMIT="3/hour") as (proxy, principals),
        dial(proxy, principals) as client,
    ):
        assert client.response is not None
        remaining = client.response.headers["ratelimit"]
        kinds = []
        for _ in range(3):
            await client.send(HELLO)
            kinds.append(json.loads(await client.recv()))
            if kinds[-1].get("event") != "error":
                await client.recv()
        with pytest.raises(InvalidStatus) as refused:
            await dial(proxy, principals)

    assert '"requests";r=2' in remaining
    assert [kind.get("event") for kind in kinds] == [None, None, "error"]
    assert (kinds[2]["data"]["code"], kinds[2]["data"]["retry_after_seconds"] > 0) == ("rate_exceeded", True)
    assert refused.value.response.status_code == 429


async def test_a_credential_that_ends_ends_the_conversation(tmp_path: Path) -> None:
    """The token is proven again for each run: what expired since the handshake runs nothing more."""
    settings = {"PROXY_JWT_LEEWAY_SECONDS": "0", "PROXY_RATE_LIMIT": "off"}
    async with upstream(echo) as url, proxied(tmp_path, url, **settings) as (proxy, principals):
        token = principals.token("alice", exp=int(time.time()) + 2)
        headers = {"Authorization": f"Bearer {token}"}
        async with connect(proxy.url.replace("http", "ws", 1) + PATH, additional_headers=headers, proxy=None) as client:
            runs = 0
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await client.send(HELLO)
                    await client.recv()
                    await client.recv()
                    runs += 1
                    await asyncio.sleep(0.05)

    assert runs > 0
    assert (client.close_code, client.close_reason) == (1008, "invalid_token")


@pytest.mark.parametrize(
    ("settings", "code", "reason"),
    [
        ({"PROXY_WEBSOCKET_IDLE_SECONDS": "0.3"}, 1001, "idle"),
        ({"PROXY_WEBSOCKET_TOTAL_SECONDS": "0.3"}, 1001, "total_deadline"),
        ({"PROXY_MAX_BODY_BYTES": "1024"}, 1009, None),
    ],
    ids=["idle", "total", "large"],
)
async def test_silence_time_and_size_are_bounded(
    tmp_path: Path, settings: dict[str, str], code: int, reason: str | None
) -> None:
    """Each has its own close."""
    async with (
        upstream(echo) as url,
        proxied(tmp_path, url, **settings) as (proxy, principals),
        dial(proxy, principals) as client,
    ):
        if reason is None:
            await client.send("x" * 2000)
        closed = await closing(client)

    assert closed[0] == code
    assert reason is None or closed[1] == reason


async def test_only_so_many_are_open(tmp_path: Path) -> None:
    """One more is told so before it opens; when one has closed there is room."""
    async with upstream(echo) as url, proxied(tmp_path, url, PROXY_WEBSOCKETS_AT_ONCE="1") as (proxy, principals):
        async with dial(proxy, principals):
            with pytest.raises(InvalidStatus) as refused:
                await dial(proxy, principals)
        await asyncio.to_thread(proxy.line_of, operation="ws", status=101)
        async with dial(proxy, principals):
            pass

    assert refused.value.response.status_code == 503


@pytest.mark.parametrize("busy", [False, True])
async def test_a_process_that_ends_lets_a_run_finish(tmp_path: Path, busy: bool) -> None:
    """After SIGTERM one that is silent is closed at once, one that runs after its run: 1012, and it says why."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def handler(connection: ServerConnection) -> None:
        async for _ in connection:
            asked.set()
            await go_on.wait()
            await connection.send('{"event":"message"}')
            await connection.send(DONE)

    async with upstream(handler) as url, proxied(tmp_path, url) as (proxy, principals):
        async with dial(proxy, principals) as client:
            heard: list[object] = []
            if busy:
                await client.send(HELLO)
                await asyncio.wait_for(asked.wait(), 10)
            proxy.process.send_signal(signal.SIGTERM)
            if busy:
                while '"server.draining"' not in proxy.log.read_text():
                    await asyncio.sleep(0.01)
                go_on.set()
                heard = [await client.recv(), await client.recv()]
            closed = await closing(client)
        status = await asyncio.to_thread(proxy.process.wait, 10)

    assert closed == (1012, "draining")
    assert heard == (['{"event":"message"}', DONE] if busy else [])
    assert status == 0


async def test_the_grace_is_over_for_a_run_that_never_ends(tmp_path: Path) -> None:
    """The process ends, and the client hears 1012 all the same."""

    async def handler(connection: ServerConnection) -> None:
        async for _ in connection:
            await connection.send('{"event":"message"}')

    async with upstream(handler) as url, proxied(tmp_path, url, PROXY_GRACE_SECONDS="1") as (proxy, principals):
        async with dial(proxy, principals) as client:
            await client.send(HELLO)
            await client.recv()
            proxy.process.send_signal(signal.SIGTERM)
            closed = await closing(client)
        await asyncio.to_thread(proxy.process.wait, 10)

    assert closed[0] == 1012


HANDSHAKES = {
    "refused": (b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n", "upstream_unreachable"),
    "distrusted": (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "upstream_distrust"),
    "elsewhere": (
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n",
        "upstream_unreachable",
    ),
    "garbage": (b"garbage\r\n\r\n", "upstream_malformed"),
    "gone": (b"", "upstream_malformed"),
}


@pytest.mark.parametrize("kind", HANDSHAKES)
async def test_a_sidecar_that_does_not_upgrade_is_a_bad_gateway(tmp_path: Path, kind: str) -> None:
    """Nothing was accepted yet, so it is an answer of 502; no redirect is followed, no token of the client's told."""
    reply, code = HANDSHAKES[kind]
    heads: list[bytes] = []

    async def talk(line: Line) -> None:
        heads.append(await line.request())
        await line.write(reply)

    async with raw_upstream(talk) as raw, proxied(tmp_path, raw.url) as (proxy, principals):
        token = principals.token("alice")
        with pytest.raises(InvalidStatus) as refused:
            await dial(proxy, principals)

    problem = json.loads(refused.value.response.body or b"{}")
    assert (refused.value.response.status_code, problem["code"], len(heads)) == (502, code, 1)
    assert token.split(".")[1].encode() not in heads[0]
    assert b"\r\nAuthorization: Bearer " in heads[0] or b"\r\nauthorization: Bearer " in heads[0]


async def test_a_sidecar_that_is_cut_off_is_told_as_such(tmp_path: Path) -> None:
    """No close came from it, so the client gets the gateway's own."""

    async def handler(connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.abort()

    async with upstream(handler) as url, proxied(tmp_path, url) as (proxy, principals):
        async with dial(proxy, principals) as client:
            await client.send(HELLO)
            closed = await closing(client)
        line = await asyncio.to_thread(proxy.line_of, operation="ws", end="upstream_cut")

    assert closed == (1014, "upstream_cut")
    assert line["fault"] == "upstream"


async def test_a_client_that_does_not_read_holds_the_sidecar_back(tmp_path: Path) -> None:
    """Of 100 MB a few are on the way; the proxy holds next to none of it."""
    sent = 0

    async def handler(connection: ServerConnection) -> None:
        nonlocal sent
        await connection.recv()
        for _ in range(1600):
            await connection.send("x" * 65_536)
            sent += 65_536

    async with (
        upstream(handler) as url,
        proxied(tmp_path, url) as (proxy, principals),
        dial(proxy, principals, max_queue=1) as client,
    ):
        before = memory_of(proxy)
        await client.send(HELLO)
        last = -1
        while sent != last or not sent:  # until nothing more goes through
            last = sent
            await asyncio.sleep(0.3)
        grown = memory_of(proxy) - before

    assert 0 < sent < 60 << 20
    assert grown < 16 << 20


def memory_of(proxy: Proxy) -> int:
    """Give the bytes that a process holds in memory."""
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
