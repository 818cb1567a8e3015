"""AgentFlow's successor, `10xgraph` with `10xgraph-api`, behind the proxy: nothing of ours knows the difference.

It runs in an environment of its own, which `make test` makes: both ship a module `agentflow`, so one cannot have both.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.agent import Agent, ask, start_agent
from tests.support.agent import stop as stop_agent
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / ".successor" / "bin" / "10xgraph"


@pytest.fixture(scope="module")
def principals() -> Principals:
    """Give everybody who may call."""
    return Principals()


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Serve the same graph by the successor."""
    assert COMMAND.exists(), "run: make .successor/.installed"
    launcher = (str(COMMAND), "dev", "--no-open", "--no-reload")
    running = start_agent(tmp_path_factory.mktemp("successor"), launcher=launcher, PYTHONPATH=str(ROOT))
    yield running
    stop_agent(running.process)


@pytest.fixture(scope="module")
def proxy(sidecar: Agent, principals: Principals, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Run the proxy before it, with the settings that the agent before it had."""
    directory = tmp_path_factory.mktemp("proxy")
    running = start_proxy(directory, sidecar.url, sidecar.secret, **principals.environment())
    yield running
    stop_proxy(running.process)


def caller(proxy: Proxy, principals: Principals, subject: str) -> httpx.Client:
    """Make a caller."""
    fields = {"Authorization": f"Bearer {principals.token(subject)}"}
    return httpx.Client(base_url=proxy.url, headers=fields, timeout=30, trust_env=False)


def test_it_is_the_successor(sidecar: Agent) -> None:
    """What answers is 10xgraph-api, and neither of the packages that it follows."""
    installed = {path.name.partition("-")[0] for path in COMMAND.parents[1].glob("lib/*/site-packages/*.dist-info")}

    assert {"10xgraph", "10xgraph_api"} <= installed
    assert not [name for name in installed if name.startswith("10xscale")]
    assert "tenxgraph_api" in sidecar.log.read_text()


def test_a_caller_invokes(proxy: Proxy, principals: Principals) -> None:
    """The short form and AgentFlow's own get an answer of the same shape."""
    with caller(proxy, principals, "alice") as client:
        answers = [client.post("/agent/invoke", json={"text": "hi"})]
        answers.append(client.post("/agent/v1/graph/invoke", json=ask("hi")))

    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    for answer in answers:
        assert answer.json()["data"]["messages"][-1]["content"][0]["text"] == "You said: hi"


def test_a_caller_streams(proxy: Proxy, principals: Principals) -> None:
    """Every delta comes, as a line of its own."""
    with caller(proxy, principals, "alice") as client:
        answer = client.post("/agent/stream", json={"text": "[words 5]"})
    lines = [json.loads(line) for line in answer.text.splitlines()]

    assert [line["message"]["content"][0]["text"] for line in lines if line["message"]["delta"]] == [
        f"w{number} " for number in range(1, 6)
    ]


def test_threads_are_kept_apart(proxy: Proxy, principals: Principals) -> None:
    """A thread remembers; of the same name another caller has his own, and this one's id is not found."""
    with caller(proxy, principals, "alice") as alice, caller(proxy, principals, "mallory") as mallory:
        made = alice.post("/agent/invoke", json={"text": "under the mat", "thread_id": "t"})
        recalled = alice.post("/agent/invoke", json={"text": "[recall]", "thread_id": "t"})
        listed = alice.get("/agent/v1/threads")
        thread_id = made.json()["data"]["meta"]["thread_id"]
        attacks = [
            mallory.post("/agent/invoke", json={"text": "[recall]", "thread_id": "t"}),
            mallory.post("/agent/invoke", json={"text": "[recall]", "thread_id": thread_id}),
            mallory.get(f"/agent/v1/threads/{thread_id}/messages"),
            mallory.get("/agent/v1/threads"),
        ]

    assert recalled.json()["data"]["messages"][-1]["content"][0]["text"] == "under the mat"
    assert thread_id in [thread["thread_id"] for thread in listed.json()["data"]["threads"]]
    assert [attack.status_code for attack in attacks[1:3]] == [404, 404]
    assert not [attack for attack in attacks if "mat" in attack.text or thread_id in attack.json().get("data", "")]


def test_a_direct_call_is_refused(sidecar: Agent, principals: Principals) -> None:
    """It trusts the proxy's internal token and nothing else."""
    token = principals.token("alice")
    statuses = [
        httpx.post(f"{sidecar.url}/v1/graph/invoke", json=ask("hi"), headers=fields, trust_env=False).status_code
        for fields in ({}, {"Authorization": f"Bearer {token}"})
    ]

    assert statuses == [401, 401]
