"""An installation of several agents and proxies, nothing of it pretended, seen by those who call it while it changes.

client → edge nginx → two proxies → inner nginx → three agents → Postgres and Redis, as docker-compose.scale.yml has it.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from html import escape
from pathlib import Path

import httpx
import pytest

from tests.support.agent import free_port
from tests.support.compose import ROOT
from tests.support.installation import GRACE, Installation, installed
from tests.support.load import Load, steady_load
from tests.support.prometheus import filled, panels, running_prometheus
from tests.support.proxy import start_proxy, stop_proxy

# Eight processes start before the first test, and on a busy machine each takes its time.
pytestmark = pytest.mark.timeout(300)
PATIENCE = 20.0
STREAMS = 30


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Run the whole of it."""
    limit = "100000/minute"
    with installed(tmp_path_factory.mktemp("installation"), agents=3, proxies=2, PROXY_RATE_LIMIT=limit) as running:
        yield running


def steadily_called(installation: Installation) -> AbstractAsyncContextManager[Load]:
    """Hold so many streams through the edge, and invoke five times a second."""
    token = installation.principals.token("load")
    return steady_load(installation.url, token, streams=STREAMS, invoke_every=0.2, words=10, pace_ms=200)


def spoken(answer: httpx.Response) -> str:
    """Give what the assistant said last."""
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"]["messages"][-1]["content"][0]["text"])


def test_a_thread_goes_on_on_another_agent(installation: Installation) -> None:
    """What was said to one agent is known to the others, whichever proxy asks."""
    installation.await_work()
    before = installation.runs()
    with installation.client() as client:
        for fruit in ("fig", "plum", "pear", "sloe", "lime", "date"):
            spoken(client.post("/agent/invoke", json={"text": fruit, "thread_id": "fruits"}))
        recalled = [
            spoken(client.post("/agent/invoke", json={"text": "[recall]", "thread_id": "fruits"})) for _ in range(3)
        ]
    served = {address for address, runs in installation.runs().items() if runs > before[address]}

    assert served == set(installation.agents)
    for words in recalled:
        assert [fruit for fruit in ("fig", "plum", "pear", "sloe", "lime", "date") if fruit not in words] == []


def test_every_panel_of_the_dashboard_shows_data(installation: Installation, tmp_path: Path) -> None:
    """A real Prometheus finds something for each query, once there was some of everything; no rule of ours fails.

    The picture in docs/ has the same panels.
    """
    shown = [panel for panel in panels() if panel["type"] != "row"]
    missing = {(panel["title"], target["expr"]) for panel in shown for target in panel["targets"]}
    health = {"unknown"}
    deadline = time.monotonic() + PATIENCE
    at = ("127.0.0.1", free_port())
    with running_prometheus(tmp_path, installation.metrics, address=at) as prometheus, installation.client() as client:
        while missing or "unknown" in health:
            assert time.monotonic() < deadline, missing
            spoken(client.post("/agent/invoke", json={"text": "hi"}))
            assert client.post("/agent/stream", json={"text": "hi"}).status_code == 200
            assert client.post("/agent/invoke", json={"text": 5}).status_code == 422
            missing = {(title, query) for title, query in missing if not prometheus.values(filled(query))}
            (group,) = prometheus.ask("rules")["groups"]
            health = {rule["health"] for rule in group["rules"]}

    assert health == {"ok"}, group
    picture = (ROOT / "docs" / "dashboard.svg").read_text()
    assert [panel["title"] for panel in shown if f">{escape(panel['title'])}<" not in picture] == []


def test_anothers_thread_stays_closed_on_every_agent(installation: Installation) -> None:
    """Several agents and proxies open no way around: a thread of one caller is nobody else's, wherever it is asked."""
    with installation.client("alice") as alice, installation.client("mallory") as mallory:
        made = alice.post("/agent/invoke", json={"text": "the key is under the mat", "thread_id": "private"})
        thread_id = made.json()["data"]["meta"]["thread_id"]
        stolen = [mallory.post("/agent/invoke", json={"text": "[recall]", "thread_id": thread_id}) for _ in range(6)]
        guessed = [mallory.post("/agent/invoke", json={"text": "[recall]", "thread_id": "private"}) for _ in range(6)]

    assert {answer.status_code for answer in stolen} == {404}
    assert not [answer for answer in guessed if "mat" in answer.text]


def test_limits_are_exact_over_proxies(installation: Installation, tmp_path: Path) -> None:
    """Two proxies that count on one Redis admit what the limit says, to the request, however calls fall on them."""
    assert installation.balancer is not None
    settings = installation.principals.environment() | {
        "PROXY_RATE_LIMIT": "20/day",
        "PROXY_REDIS_URL": installation.storage["AGENT_REDIS_URL"],
        "PROXY_REDIS_TIMEOUT_SECONDS": "5",
        "PROXY_AGENT_AUDIENCE": "agentflow",
    }
    proxies = [start_proxy(tmp_path, installation.balancer.url, installation.secret, **settings) for _ in range(2)]
    fields = {"Authorization": f"Bearer {installation.principals.token('greedy')}"}

    def ask(number: int) -> int:
        return httpx.get(f"{proxies[number % 2].url}/agent/ping", headers=fields, timeout=30).status_code

    try:
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(ask, range(60)))
    finally:
        for proxy in proxies:
            stop_proxy(proxy.process)

    assert (statuses.count(200), statuses.count(429)) == (20, 40)


async def test_added_members_have_work_and_removed_ones_none(installation: Installation) -> None:
    """`--scale agent=4 --scale proxy=3` and back, under load: both nginx ask for the names again, and nothing fails."""
    async with steadily_called(installation) as load, asyncio.timeout(GRACE):
        _, proxy = await asyncio.gather(
            asyncio.to_thread(installation.add_agent), asyncio.to_thread(installation.add_proxy)
        )
        agent_address, proxy_address = list(installation.agents)[-1], list(installation.proxies)[-1]
        while not installation.runs()[agent_address] or not proxy.has_answered():
            await asyncio.sleep(0.05)
        statuses = await asyncio.gather(
            asyncio.to_thread(installation.remove_agent, agent_address),
            asyncio.to_thread(installation.remove_proxy, proxy_address),
        )

    names = installation.names
    asked = names.asked["proxy"]
    while names.asked["proxy"] < asked + 2:  # by now the edge has forgotten, too, that this one failed
        await asyncio.sleep(0.05)
    with socket.create_server((proxy_address, installation.proxy_port)) as grave, installation.client() as client:
        later = [client.get("/agent/ping").status_code for _ in range(12)]
        grave.setblocking(False)
        with pytest.raises(BlockingIOError):
            grave.accept()

    assert load.failures == []
    assert statuses == [-signal.SIGTERM, 0]
    assert later == [200] * 12


async def test_a_killed_agent_costs_its_own_runs_only(installation: Installation) -> None:
    """Its streams are cut, visibly; the others' go on, and whoever comes next is served by those that are left."""
    victim = next(iter(installation.agents))
    fields = {"Authorization": f"Bearer {installation.principals.token('alice')}"}
    began = asyncio.Semaphore(0)

    async def stream(client: httpx.AsyncClient) -> bool:
        try:
            async with client.stream("POST", "/agent/stream", json={"text": "[words 30] [pace 50ms]"}) as answer:
                async for _ in answer.aiter_raw():
                    began.release()
        except httpx.RemoteProtocolError:
            return False
        return True

    async with httpx.AsyncClient(base_url=installation.url, headers=fields, timeout=30, trust_env=False) as client:
        streams = [asyncio.create_task(stream(client)) for _ in range(9)]
        for _ in range(30):
            await began.acquire()
        installation.agents[victim].process.kill()
        await asyncio.to_thread(installation.agents.pop(victim).process.wait, 10)
        next_ones = [await client.post("/agent/invoke", json={"text": "hi"}) for _ in range(20)]
        whole = await asyncio.gather(*streams)
    installation.start_agent(victim)

    assert [answer.status_code for answer in next_ones] == [200] * 20
    assert whole.count(False) == 3


async def test_agents_are_replaced_under_load(installation: Installation) -> None:
    """Agents are restarted in turn: each ends what it does, and no stream and no invoke notices."""
    async with steadily_called(installation) as load:
        for address in tuple(installation.agents)[:2]:
            await installation.replace_agent(address)

    assert load.failures == []
    assert load.streams > STREAMS


async def test_proxies_are_replaced_under_load(installation: Installation) -> None:
    """Every proxy is restarted in turn, with status 0: it ends what it does, and no stream and no invoke notices."""
    async with steadily_called(installation) as load:
        statuses = [await installation.replace_proxy(address) for address in tuple(installation.proxies)]

    assert load.failures == []
    assert statuses == [0, 0]


async def test_both_nginx_are_reloaded_under_load(installation: Installation) -> None:
    """New workers take over with the configuration read anew; the old ones end what they relay."""
    assert installation.edge is not None
    assert installation.balancer is not None
    async with steadily_called(installation) as load:
        for nginx in (installation.balancer, installation.edge):
            installation.reload(nginx)
            await asyncio.sleep(0.5)

    assert load.failures == []
