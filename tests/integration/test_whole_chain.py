"""The whole chain, nothing of it pretended: client → nginx as deployed → the proxy → a real sidecar process.

Two callers, one with a token and one with a key; what they get is held against the sidecar's own bytes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from proxy.operations import OPERATIONS
from tests.support.agent import Agent, ask, internal_token, start_agent
from tests.support.agent import stop as stop_agent
from tests.support.nginx import Nginx, start_nginx
from tests.support.nginx import stop as stop_nginx
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy


@dataclass(frozen=True, slots=True)
class Chain:
    """Every part of a deployment, running."""

    agent: Agent
    proxy: Proxy
    nginx: Nginx
    principals: Principals
    key: str

    def client(self, kind: str) -> httpx.Client:
        """Make a client at the edge, with a token or with a key."""
        signed = {"Authorization": f"Bearer {self.principals.token('alice')}"}
        headers = signed if kind == "jwt" else {"X-API-Key": self.key}
        return httpx.Client(base_url=self.nginx.url, headers=headers, timeout=30, trust_env=False)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Run the whole of it."""
    directory = tmp_path_factory.mktemp("chain")
    principals = Principals()
    key = principals.key("billing")
    agent = start_agent(directory, JWT_ISSUER="agentflow-proxy", JWT_AUDIENCE="agentflow")
    proxy = nginx = None
    try:
        proxy = start_proxy(
            directory,
            agent.url,
            agent.secret,
            **principals.environment(),
            PROXY_AGENT_AUDIENCE="agentflow",
            PROXY_TRUSTED_HOPS="1",
            PROXY_RATE_LIMIT="1000/minute",
        )
        nginx = start_nginx(directory, proxy.url)
        yield Chain(agent, proxy, nginx, principals, key)
    finally:
        if nginx is not None:
            stop_nginx(nginx)
        if proxy is not None:
            stop_proxy(proxy.process)
        stop_agent(agent.process)


KINDS = pytest.mark.parametrize("kind", ["jwt", "key"])


@KINDS
def test_a_caller_invokes(chain: Chain, kind: str) -> None:
    """Either credential gets a real answer, in the short form and in AgentFlow's own."""
    with chain.client(kind) as client:
        short = client.post("/agent/invoke", json={"text": "hi"})
        full = client.post("/agent/v1/graph/invoke", json=ask("hi"))

    assert [short.status_code, full.status_code] == [200, 200]
    for answer in (short, full):
        assert answer.json()["data"]["messages"][-1]["content"][0]["text"] == "You said: hi"


@KINDS
def test_a_caller_streams(chain: Chain, kind: str) -> None:
    """Either credential gets every delta, as the lines the sidecar wrote."""
    with chain.client(kind) as client:
        answer = client.post("/agent/stream", json={"text": "[words 5]"})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    deltas = [line["message"]["content"][0]["text"] for line in lines if line["message"]["delta"]]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert deltas == ["w1 ", "w2 ", "w3 ", "w4 ", "w5 "]


@KINDS
def test_a_thread_remembers(chain: Chain, kind: str) -> None:
    """What was said in a thread is known in it, and each caller has a thread of his own of one name."""
    with chain.client(kind) as client:
        client.post("/agent/invoke", json={"text": f"I am {kind}", "thread_id": "memory"})
        recalled = client.post("/agent/invoke", json={"text": "[recall]", "thread_id": "memory"})
        listed = client.get("/agent/v1/threads").json()["data"]["threads"]
        messages = client.get("/agent/v1/threads/memory/messages")

    assert recalled.json()["data"]["messages"][-1]["content"][0]["text"] == f"I am {kind}"
    assert [thread["thread_id"].rpartition("~")[2] for thread in listed].count("memory") == 1
    assert messages.status_code == 200


def test_the_bytes_of_a_stream_are_the_sidecars_own(chain: Chain) -> None:
    """Through nginx and the proxy, a run reads byte for byte as it does straight from the sidecar.

    Ids and times differ between two runs, so those are blanked on both sides and nothing else is.
    """
    text = '[words 40] ünïcödé \u2028 \\ " \u0000 \U0001f600 ' + "x" * 5000
    with chain.client("jwt") as client:
        answer = client.post("/agent/stream", json={"text": text, "thread_id": "bytes"})
    thread_id = json.loads(answer.content.split(b"\n")[0])["thread_id"].rpartition("~")
    direct = httpx.post(
        f"{chain.agent.url}/v1/graph/stream",
        json=ask(text, f"{'o' * len(thread_id[0])}~bytes"),
        headers={"Authorization": f"Bearer {signed_for(chain)}"},
        timeout=30,
    )

    assert blanked(answer.content) == blanked(direct.content)
    assert answer.content.count(b"\n") == direct.content.count(b"\n") >= 41


def signed_for(chain: Chain) -> str:
    """Sign what the proxy would sign."""
    return internal_token(chain.agent.secret, "direct", iss="agentflow-proxy", aud="agentflow")


def blanked(content: bytes) -> bytes:
    """Blank ids and times."""
    content = re.sub(rb'"(timestamp)":[0-9.]+', rb'"\1":0', content)
    content = re.sub(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", b"id", content)
    return re.sub(rb'"[a-z0-9]{16}~bytes"', b'"thread"', content)


def test_the_first_token_arrives_before_the_second_is_written(chain: Chain) -> None:
    """A client that waits for its first token has it while the model still pauses before the next."""
    text = "[words 3] [pace 400ms]"
    with chain.client("jwt") as client, client.stream("POST", "/agent/stream", json={"text": text}) as answer:
        parts = list(answer.iter_raw())
    positions = [next(at for at, part in enumerate(parts) if token in part) for token in (b'"w1 "', b'"w2 "', b'"w3 "')]

    assert positions == sorted(set(positions))


def test_the_sidecar_refuses_whoever_is_not_the_proxy(chain: Chain) -> None:
    """A direct call with the caller's own credential, or none, gets nothing."""
    token = chain.principals.token("alice")

    direct = httpx.post(f"{chain.agent.url}/v1/graph/invoke", json=ask("hi"))
    forwarded = httpx.post(
        f"{chain.agent.url}/v1/graph/invoke", json=ask("hi"), headers={"Authorization": f"Bearer {token}"}
    )

    assert [direct.status_code, forwarded.status_code] == [401, 401]


def test_a_refusal_reads_the_same_through_nginx(chain: Chain) -> None:
    """The proxy's problem and challenges pass nginx untouched, with the id that is in the log."""
    answer = httpx.post(f"{chain.nginx.url}/agent/invoke", json={"text": "hi"})

    assert answer.status_code == 401
    assert answer.headers.get_list("www-authenticate") == ['Bearer realm="agent"', 'ApiKey realm="agent"']
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_the_access_line_tells_what_happened_and_nothing_more(chain: Chain) -> None:
    """One line for a request: who, what, how much, how it ended."""
    with chain.client("key") as client:
        client.post("/agent/invoke", json={"text": "a secret prompt"}, headers={"X-Request-Id": "line-1"})
    line = chain.proxy.line_of(request_id="line-1")

    assert line["event"] == "request.finished"
    assert (line["principal"], line["credential"], line["operation"]) == ("billing", "api_key", "invoke")
    assert (line["status"], line["end"], line["method"], line["path"]) == (200, "done", "POST", "/agent/invoke")
    assert line["client"] == "127.0.0.1"
    assert line["bytes"] > 0
    assert 0 < line["first_byte_ms"] <= line["duration_ms"]
    assert "a secret prompt" not in chain.proxy.log.read_text()


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/docs", "/openapi.json"])
def test_what_is_public_is_public(chain: Chain, path: str) -> None:
    """Health and the API page need no credential."""
    assert httpx.get(f"{chain.nginx.url}{path}").status_code == 200


def test_the_page_loads_nothing_and_runs_nothing(chain: Chain) -> None:
    """/docs reaches for no host and no script, nor would its policy let it; each operation is on it."""
    answer = httpx.get(f"{chain.nginx.url}/docs")

    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert not re.findall(r"<script|<link|<img|<iframe|\bsrc=|https?://", answer.text)
    for row in OPERATIONS:
        assert f"<code>{row.method} {row.path}</code>" in answer.text
    assert "$URL/agent/stream&quot; -H &quot;X-API-Key: $KEY&quot;" in answer.text


def test_the_document_describes_every_operation_with_both_credentials(chain: Chain) -> None:
    """Both credentials are described, and each run's example is one that works."""
    described = httpx.get(f"{chain.nginx.url}/openapi.json").json()
    examples = described["paths"]["/agent/invoke"]["post"]["requestBody"]["content"]["application/json"]["examples"]

    with chain.client("jwt") as client:
        answers = [client.post("/agent/invoke", json=example["value"]) for example in examples.values()]

    assert {"bearer", "apiKey"} == set(described["components"]["securitySchemes"])
    assert [answer.status_code for answer in answers] == [200] * len(answers) == [200, 200]
