"""The nginx between proxies and agents, real and as deployed: it spreads, holds nothing back and repeats no run."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.agent import free_port
from tests.support.names import Names, running_names
from tests.support.nginx import BALANCER, Nginx, nginx_command, start_nginx, stop, write_config
from tests.support.raw_upstream import CHUNKED_HEAD, Line, RawUpstream, Talk, answer, chunk, raw_upstream

ADDRESSES = ["127.0.0.21", "127.0.0.22", "127.0.0.23"]
RUN = "/v1/graph/invoke"


@pytest.fixture(scope="module")
def names() -> Iterator[Names]:
    """Run a name server."""
    with running_names() as running:
        yield running


@pytest.fixture(scope="module")
def port() -> int:
    """Give the port of every agent."""
    return free_port()


@pytest.fixture(scope="module")
def balancer(names: Names, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """Run the balancer before three addresses, at which each test serves what it likes."""
    names.addresses["agent"] = ADDRESSES
    directory = tmp_path_factory.mktemp("balancer")
    running = start_nginx(directory, f"http://agent:{port}", deployed=BALANCER, resolver=names.address)
    yield running
    stop(running)


@asynccontextmanager
async def client_of(balancer: Nginx) -> AsyncIterator[httpx.AsyncClient]:
    """Make a client, as a proxy is one."""
    async with httpx.AsyncClient(base_url=balancer.url, timeout=20, trust_env=False) as client:
        yield client


@asynccontextmanager
async def agents(port: int, *talks: Talk) -> AsyncIterator[list[RawUpstream]]:
    """Serve one talk at each address; at the addresses that are left nobody listens."""
    async with asyncio.timeout(30):
        if not talks:
            yield []
            return
        at = ADDRESSES[len(ADDRESSES) - len(talks)], port
        async with raw_upstream(talks[0], at=at) as first, agents(port, *talks[1:]) as others:
            yield [first, *others]


async def until_known(client: httpx.AsyncClient, members: list[RawUpstream]) -> None:
    """Wait until the balancer asks each of these, and has forgotten who failed in the test before."""
    async with asyncio.timeout(20):
        while not all(member.accepted for member in members):
            await client.get("/ping")
            await asyncio.sleep(0.02)


async def well(line: Line) -> None:
    """Answer one request."""
    if await line.request():
        await line.write(answer(b"{}", "connection: close"))


def streaming(then: Talk) -> Talk:
    """Make an agent that answers what is no stream, and has begun one when it talks as `then` does."""

    async def talk(line: Line) -> None:
        if b"stream" not in await line.request():
            await line.write(answer(b"{}", "connection: close"))
            return
        await line.write(CHUNKED_HEAD + chunk(b"first"))
        await then(line)

    return talk


def test_deployed_configuration_is_accepted(tmp_path: Path) -> None:
    """`nginx -t` finds nothing to say about the file, as a user without privileges runs it."""
    config = write_config(tmp_path, listen="127.0.0.1:8001", upstream="http://127.0.0.1:1", deployed=BALANCER)

    test = subprocess.run(nginx_command(tmp_path, config, "-t", "-q"), capture_output=True, check=False, timeout=30)

    assert (test.returncode, test.stdout, test.stderr) == (0, b"", b"")


async def test_an_agent_that_refuses_costs_no_run(balancer: Nginx, port: int) -> None:
    """Where nobody listens nothing was sent: the run goes to the next, and is asked of one only."""
    async with client_of(balancer) as client, agents(port, well) as (only,):
        await until_known(client, [only])
        before = only.accepted
        statuses = [(await client.post(RUN, json={})).status_code for _ in range(12)]

        assert statuses == [200] * 12
        assert only.accepted == before + 12


async def test_a_run_that_began_is_asked_of_nobody_else(balancer: Nginx, port: int) -> None:
    """An agent that dies over a run has perhaps paid for it: the proxy is told, and no other agent hears of it."""
    heard: list[bytes] = []

    async def die(line: Line) -> None:
        request = await line.request()
        if b"POST" not in request:
            await line.write(answer(b"{}", "connection: close"))
            return
        heard.append(request)
        line.reset()

    async with client_of(balancer) as client, agents(port, die, die, die) as members:
        await until_known(client, members)
        told = await client.post(RUN, json={}, headers={"X-Request-Id": "run-1"})

        assert len(heard) == 1
        assert told.status_code == 502
        assert told.headers["content-type"] == "application/problem+json"
        assert told.json() == {
            "type": "about:blank",
            "title": "The agent cannot be reached",
            "status": 502,
            "code": "upstream_unreachable",
            "request_id": "run-1",
        }


async def test_runs_go_where_fewest_are(balancer: Nginx, port: int) -> None:
    """While one agent is busy with streams, the next runs go to the others."""
    held: list[Line] = []

    async def hold(line: Line) -> None:
        held.append(line)
        await line.gone()

    async with client_of(balancer) as client, agents(port, *[streaming(hold)] * 3) as members:
        await until_known(client, members)
        async with asyncio.TaskGroup() as group:
            streams = [client.stream("POST", "/v1/graph/stream", json={}) for _ in range(9)]
            answers = [await stream.__aenter__() for stream in streams]
            per_agent = {member.url: 0 for member in members}
            for line in held:
                host, at = line.writer.get_extra_info("sockname")
                per_agent[f"http://{host}:{at}"] += 1
            for answered in answers:
                group.create_task(answered.aclose())

        assert sorted(per_agent.values()) == [3, 3, 3]


async def test_events_pass_when_they_are_written_and_a_leaving_client_is_told_of(balancer: Nginx, port: int) -> None:
    """No event waits for the next; who hangs up is gone for the agent too."""
    passed = asyncio.Event()
    gone = asyncio.Event()

    async def go_on(line: Line) -> None:
        await passed.wait()
        await line.write(chunk(b"second"))
        await line.gone()
        gone.set()

    async with client_of(balancer) as client, agents(port, *[streaming(go_on)] * 3) as members:
        await until_known(client, members)
        async with client.stream("POST", "/v1/graph/stream", json={}) as streamed:
            parts = streamed.aiter_raw()
            first = await anext(parts)
            passed.set()
            second = await anext(parts)
        await asyncio.wait_for(gone.wait(), 10)

        assert (first, second) == (b"first", b"second")


async def test_a_cut_stream_stays_cut(balancer: Nginx, port: int) -> None:
    """A body that the agent did not end does not end well at the proxy either."""

    async def die(line: Line) -> None:
        line.reset()

    async with client_of(balancer) as client, agents(port, *[streaming(die)] * 3) as members:
        await until_known(client, members)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/graph/stream", json={})


async def test_fields_pass_as_they_are(balancer: Nginx, port: int) -> None:
    """What the proxy says of the caller arrives, under the name it asked for; an upgrade is handed on."""
    heard: list[bytes] = []

    async def talk(line: Line) -> None:
        heard.append(await line.request())
        if b"Upgrade: websocket" in heard[-1]:
            await line.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
            return
        await line.write(answer(b"{}", "connection: close"))

    async with client_of(balancer) as client, agents(port, talk, talk, talk) as members:
        await until_known(client, members)
        heard.clear()
        await client.post(
            "/v1//graph%2Finvoke?a=b", json={}, headers={"Authorization": "Bearer t", "Host": "agent:8001"}
        )
        asked = heard[-1].decode()
        reader, writer = await asyncio.open_connection(balancer.host, balancer.port)
        writer.write(b"GET /v1/graph/ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        switched = await reader.readline()
        writer.close()

        assert asked.startswith("POST /v1//graph%2Finvoke?a=b HTTP/1.1\r\n")
        assert "Authorization: Bearer t\r\n" in asked
        assert "Host: agent:8001\r\n" in asked
        assert "Connection: close\r\n" in asked
        assert switched == b"HTTP/1.1 101 Switching Protocols\r\n"
