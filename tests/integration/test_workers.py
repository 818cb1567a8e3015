"""Several workers behind one port: `serve --workers N`, as on a machine that has no orchestrator."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.agent import Agent, free_port, start_agent
from tests.support.agent import stop as stop_agent
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

WORKERS = 2
PATIENCE = 20.0


@pytest.fixture(scope="module")
def principals() -> Principals:
    """Give everybody who may call."""
    return Principals()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Run a real sidecar."""
    running = start_agent(tmp_path_factory.mktemp("agent"))
    yield running
    stop_agent(running.process)


@pytest.fixture
def proxy(tmp_path: Path, agent: Agent, principals: Principals) -> Iterator[Proxy]:
    """Run a proxy of two workers."""
    settings = principals.environment() | {"PROXY_RATE_LIMIT": "20/minute"}
    running = start_proxy(tmp_path, agent.url, agent.secret, "--workers", str(WORKERS), **settings)
    await_true(lambda: len(workers(running)) == WORKERS and starts(running) == WORKERS)
    yield running
    stop_proxy(running.process)


def workers(proxy: Proxy) -> set[int]:
    """Give the process ids of the workers."""
    with contextlib.suppress(FileNotFoundError):
        children = Path(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}
    return set()


def starts(proxy: Proxy) -> int:
    """Count how often a worker has begun to listen."""
    return sum(line["event"] == "server.started" for line in proxy.log_lines())


def await_true(claim: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Say whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def caller(proxy: Proxy, principals: Principals, subject: str) -> httpx.Client:
    """Make a client that opens a connection for each request, so that any worker may get it."""
    fields = {"Authorization": f"Bearer {principals.token(subject)}", "Connection": "close"}
    return httpx.Client(base_url=proxy.url, headers=fields, timeout=20, trust_env=False)


def test_a_dead_worker_is_replaced(proxy: Proxy, principals: Principals) -> None:
    """The others serve on meanwhile; soon there are as many as before, on the same port."""
    before = workers(proxy)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)

    with caller(proxy, principals, "ann") as client:
        meanwhile = [client.get("/health/ready").status_code for _ in range(10)]
    await_true(lambda: starts(proxy) == WORKERS + 1)

    assert meanwhile == [200] * 10
    assert len(workers(proxy)) == WORKERS
    assert victim not in workers(proxy)
    assert [line["status"] for line in proxy.log_lines() if line["event"] == "worker.died"] == [-signal.SIGKILL]


def test_workers_share_most_of_their_memory(proxy: Proxy) -> None:
    """What was there before they began is there once: a worker adds less than half of what it shows (proc(5))."""
    for pid in workers(proxy):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}

        assert kib["Private_Dirty"] + kib["Private_Clean"] < kib["Rss"] / 2


def test_a_drain_ends_every_stream_and_then_every_worker(proxy: Proxy, principals: Principals) -> None:
    """SIGTERM to the supervisor: what runs goes on to its end, nobody new is let in, and the status is 0."""
    living = workers(proxy)
    with contextlib.ExitStack() as stack:
        streams = []
        for number in range(6):
            client = stack.enter_context(caller(proxy, principals, f"user-{number}"))
            run = client.stream("POST", "/agent/stream", json={"text": "[words 8] [pace 100ms]"})
            parts = stack.enter_context(run).iter_raw()
            streams.append((next(parts), parts))
        proxy.process.send_signal(signal.SIGTERM)
        bodies = [first + b"".join(parts) for first, parts in streams]
    status = proxy.process.wait(PATIENCE)

    assert all(b'"text":"w1 w2 w3 w4 w5 w6 w7 w8' in body for body in bodies)
    assert status == 0
    assert not [pid for pid in living if is_running(pid)]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{proxy.url}/health/live", trust_env=False)


def test_all_workers_together_admit_no_more_than_the_limit(proxy: Proxy, principals: Principals) -> None:
    """What each counts by itself is its share, so that however calls fall no caller gets more than the limit says."""
    with caller(proxy, principals, "greedy") as client:
        statuses = [client.get("/agent/ping").status_code for _ in range(60)]

    assert 10 <= statuses.count(200) <= 20
    assert set(statuses) == {200, 429}


def test_workers_are_counted_together(tmp_path: Path, agent: Agent, principals: Principals) -> None:
    """Whichever worker is asked for the metrics, it tells of all of them."""
    port = str(free_port())
    settings = principals.environment() | {"PROXY_METRICS_PORT": port, "PROXY_RATE_LIMIT": "off"}
    running = start_proxy(tmp_path, agent.url, agent.secret, "--workers", str(WORKERS), **settings)
    try:
        await_true(lambda: starts(running) == WORKERS)
        with caller(running, principals, "ann") as client:
            for _ in range(20):
                assert client.get("/agent/ping").is_success

        def told() -> bool:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
            lines = [line for line in text.splitlines() if line.startswith("agent_proxy_requests_total{")]
            pings = sum(float(line.split()[-1]) for line in lines if 'operation="ping"' in line)
            return pings == 20 and f"agent_proxy_workers {WORKERS}.0" in text.splitlines()

        await_true(told)
    finally:
        stop_proxy(running.process)


def test_workers_do_not_outlive_their_supervisor(proxy: Proxy) -> None:
    """A supervisor that is killed leaves nobody who serves on unsupervised."""
    living = workers(proxy)

    proxy.process.kill()
    proxy.process.wait(PATIENCE)

    await_true(lambda: not [pid for pid in living if is_running(pid)])


def test_what_no_worker_can_start_with_stops_the_supervisor(tmp_path: Path, principals: Principals) -> None:
    """What is found out only by trying ends the whole of it with status 1 and the sentence, not tried forever."""
    settings = principals.environment() | {
        "PROXY_AGENT_SECRET": "the secret of the agent behind, 32+",
        "PROXY_PORT": "0",
        "PROXY_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/never-migrated.db",
    }
    ended = subprocess.run(
        [Path(sys.executable).with_name("agentflow-proxy"), "serve", "--workers", "2"],
        env={"PATH": os.defpath, "HOME": str(tmp_path), **{name: value for name, value in settings.items() if value}},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert ended.returncode == 1
    assert "agentflow-proxy migrate" in ended.stderr
