"""`agentflow-proxy check --live` before dependencies that are well, and before each in the ways that it fails."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from proxy.operations import OPERATIONS
from tests.security.wire import json_answer, stub_upstream
from tests.support.agent import Agent, start_agent, stop
from tests.support.oidc import run_provider

SECRET = "s" * 48

type Findings = dict[str, tuple[str, str]]


def run(directory: Path, agent_url: str, *words: str, secret: str = SECRET, **environment: str) -> tuple[int, str]:
    """Run the command; give its status and what it printed."""
    variables = {
        "PATH": os.defpath, "HOME": str(directory), "PYTHONWARNINGS": "error", "PROXY_AGENT_URL": agent_url,
        "PROXY_AGENT_SECRET": secret, "PROXY_JWT_SECRET": "j" * 48, **environment,
    }  # fmt: skip
    command = [Path(sys.executable).with_name("agentflow-proxy"), "check", "--live", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=directory)
    assert done.stderr == ""
    return done.returncode, done.stdout


def findings(directory: Path, agent_url: str, **environment: str) -> tuple[int, Findings]:
    """Run it for scripts; give its status, and verdict and sentence by dependency."""
    status, text = run(directory, agent_url, "--json", **environment)
    return status, {each["dependency"]: (each["verdict"], each["sentence"]) for each in json.loads(text)["findings"]}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """Run a real sidecar."""
    running = start_agent(tmp_path_factory.mktemp("agent"))
    yield running
    stop(running.process)


def test_a_real_agent_is_well(agent: Agent, tmp_path: Path) -> None:
    """It answers, is guarded, trusts us, has our routes, and its clock is ours; in words, with status 0."""
    status, text = run(tmp_path, agent.url, secret=agent.secret)
    told = [line.split()[0] for line in text.splitlines() if line.split()[1:2] == ["agent"]]

    assert status == 0
    assert told == ["ok"] * 5
    assert agent.secret not in text


def test_another_secret_is_found_out(agent: Agent, tmp_path: Path) -> None:
    """What would be 502 `upstream_distrust` for everybody is said beforehand."""
    status, found = findings(tmp_path, agent.url)

    assert status == 1
    assert found["agent trust"][0] == "wrong"
    assert "JWT_SECRET_KEY" in found["agent trust"][1]


def test_everything_else_is_asked_too(agent: Agent, tmp_path: Path) -> None:
    """A provider that publishes keys is well; a database without a schema, a silent collector are not."""
    with run_provider() as provider, socket.create_server(("127.0.0.1", 0)) as silent:
        issuers = tmp_path / "issuers.toml"
        issuers.write_text(provider.entry())
        status, found = findings(
            tmp_path, agent.url, secret=agent.secret, PROXY_ISSUERS_FILE=str(issuers),
            PROXY_DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}/keys.db",
            PROXY_OTLP_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
        )  # fmt: skip

    assert status == 1
    assert found[f"issuer {provider.issuer}"] == ("ok", "publishes 1 usable keys")
    assert found["database"] == ("wrong", "has another version's schema, or none; run: agentflow-proxy migrate")
    assert found["traces"] == ("wrong", "does not answer within 5 s")
    assert found["agent trust"][0] == "ok"


def _agent_that(
    *, date: float | None = None, guarded: bool = True, routes: bool | None = None, pong: bytes = b'{"data":"pong"}'
) -> Callable[[bytes], bytes]:
    """Answer like a sidecar, but for what is said."""
    rows = {row.upstream: {row.method.lower(): {}} for row in OPERATIONS if row.name != "stop"}
    head = [f"date: {formatdate(date, usegmt=True)}".encode()] if date is not None else []

    def respond(request: bytes) -> bytes:
        path = request.split(b" ")[1].decode()
        if path == "/ping":
            return json_answer(pong, "200 OK", *head)
        if path.startswith("/v1/threads"):
            is_let_in = not guarded or b"authorization" in request.lower()
            return json_answer(b'{"data":{"threads":[]}}' if is_let_in else b"{}", "200 OK" if is_let_in else "401 No")
        if path == "/openapi.json" and routes is not None:
            return json_answer(json.dumps({"paths": rows}).encode())
        return json_answer(b"{}", "404 Not Found")

    return respond


@pytest.mark.parametrize(
    ("respond", "dependency", "verdict", "words"),
    [
        (_agent_that(date=1_700_000_000), "agent clock", "wrong", "behind this machine's"),
        (_agent_that(), "agent clock", "unknown", "no Date"),
        (_agent_that(guarded=False), "agent authentication", "wrong", "asks nobody for a token"),
        (_agent_that(routes=False), "agent routes", "wrong", "POST /v1/graph/stop"),
        (_agent_that(), "agent routes", "unknown", "not published"),
        (_agent_that(pong=b"hello"), "agent", "wrong", "is no AgentFlow server"),
        (lambda _: b"SSH-2.0-x\r\n\r\n", "agent", "wrong", "does not speak HTTP"),
    ],
    ids=["clock", "no-clock", "unguarded", "routes", "production", "stranger", "no-http"],
)
def test_each_fault_of_an_agent_has_its_sentence(
    tmp_path: Path, respond: Callable[[bytes], bytes], dependency: str, verdict: str, words: str
) -> None:
    """And only what is wrong makes the status 1."""
    with stub_upstream(respond) as stub:
        status, found = findings(tmp_path, stub.url)

    assert found[dependency][0] == verdict
    assert words in found[dependency][1]
    assert status == int(any(each == "wrong" for each, _ in found.values()))


def test_nobody_there_is_said_so(tmp_path: Path) -> None:
    """A port where nobody listens, and a socket that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    status, found = findings(tmp_path, url)

    assert status == 1
    assert found == {"agent": ("wrong", f"nobody listens at {url}, or its name leads nowhere")}

    url = f"http+unix://{tmp_path}/agent.sock"
    status, found = findings(tmp_path, url)

    assert status == 1
    assert found == {"agent": ("wrong", f"nobody listens at {url}, or this user may not connect there")}


def test_bad_settings_come_first(tmp_path: Path) -> None:
    """Nothing is asked before they are right; scripts get them as JSON."""
    environment = {"PATH": os.defpath, "PROXY_AGENT_SECRET": "short", "PROXY_JWT_SECRET": "j" * 48}
    command = [Path(sys.executable).with_name("agentflow-proxy"), "check", "--live", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"][0].startswith("PROXY_AGENT_SECRET: ")
