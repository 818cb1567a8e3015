"""The agent as a real process: who may call it, what it streams and remembers, when it will not start."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy import usage
from proxy.model import Usage
from proxy.usage import reader_for
from tests.support.agent import (
    PRODUCTION,
    Agent,
    AgentStoppedError,
    ask,
    free_port,
    internal_token,
    start_agent,
    stop,
)

INVOKE = "/v1/graph/invoke"
STREAM = "/v1/graph/stream"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One agent for the whole module; each test has threads of its own."""
    agent = start_agent(tmp_path_factory.mktemp("agent"))
    yield agent
    stop(agent.process)


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[httpx.AsyncClient]:
    """Call with the proxy's own credentials."""
    async with _client(agent) as client:
        yield client


@pytest.mark.parametrize("operation", [INVOKE, STREAM])
async def test_a_call_without_a_token_is_refused(client: httpx.AsyncClient, operation: str) -> None:
    """Nobody who merely reaches the port can use the agent."""
    del client.headers["Authorization"]

    answer = await client.post(operation, json=ask("hello"))

    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("secret", "claims"),
    [("another secret of at least 32 bytes", {}), (None, {"exp": 1}), (None, {"exp": None})],
)
async def test_a_token_the_proxy_would_not_sign_is_refused(
    agent: Agent, client: httpx.AsyncClient, secret: str | None, claims: dict[str, Any]
) -> None:
    """Another secret, a token past its time and one without an end are all 401."""
    token = internal_token(secret or agent.secret, **claims)

    answer = await client.post(INVOKE, json=ask("hello"), headers={"Authorization": f"Bearer {token}"})

    assert answer.status_code == 401


async def test_invoke_echoes_and_counts(client: httpx.AsyncClient) -> None:
    """Without directives the agent repeats what was said, and says what that cost."""
    answer = await client.post(INVOKE, json=ask("hello there"))

    assert answer.status_code == 200
    last = answer.json()["data"]["messages"][-1]
    assert _text(last) == "You said: hello there"
    usage = last["usages"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 4, 6)


async def test_a_stream_is_deltas_then_the_whole(client: httpx.AsyncClient) -> None:
    """Every word is a line of its own; the last line is the whole answer with its usage."""
    answer = await client.post(STREAM, json=ask("[words 3]"))

    *deltas, whole = [line["message"] for line in _lines(answer) if _by_assistant(line)]
    assert [(_text(delta), delta["delta"]) for delta in deltas] == [(f"w{n} ", True) for n in (1, 2, 3)]
    assert (_text(whole), whole["delta"]) == ("w1 w2 w3 ", False)
    assert whole["usages"]["completion_tokens"] == 3


async def test_deltas_arrive_while_the_answer_is_being_made(client: httpx.AsyncClient) -> None:
    """The first words of an answer that takes ten minutes are there long before its end."""
    async with client.stream("POST", STREAM, json=ask("[words 600] [pace 1s]")) as answer:
        first = await anext(_deltas(answer))

    assert first == "w1 "


async def test_a_closed_stream_stops_the_model(client: httpx.AsyncClient) -> None:
    """What a client no longer reads is no longer made: the abandoned answer never reaches the thread."""
    script = "[words 40] [pace 10ms]"
    async with client.stream("POST", STREAM, json=ask(script, "abandoned")) as answer:
        await anext(_deltas(answer))

    # As long as the abandoned one would have taken, had it gone on beside this one.
    await client.post(STREAM, json=ask(script, "finished"))

    assert "w40" in await _whole_thread(client, "finished")
    assert "w40" not in await _whole_thread(client, "abandoned")


async def test_a_thread_goes_on_after_a_closed_stream(client: httpx.AsyncClient) -> None:
    """An abandoned run leaves its thread usable."""
    async with client.stream("POST", STREAM, json=ask("[words 600] [pace 1s]", "goes-on")) as answer:
        await anext(_deltas(answer))

    again = await client.post(INVOKE, json=ask("hello", "goes-on"))

    assert _text(again.json()["data"]["messages"][-1]) == "You said: hello"


async def test_a_thread_remembers(client: httpx.AsyncClient) -> None:
    """What was said in a thread is recalled in it, and in no other."""
    await client.post(INVOKE, json=ask("the kettle is blue", "remembers"))

    recalled = await client.post(INVOKE, json=ask("[recall]", "remembers"))
    elsewhere = await client.post(INVOKE, json=ask("[recall]", "elsewhere"))

    assert _text(recalled.json()["data"]["messages"][-1]) == "the kettle is blue"
    assert _text(elsewhere.json()["data"]["messages"][-1]) == "Nothing was said before."


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("[tool add 2 3]", "The tool add answered: 5"),
        ("[tool word_count a b]", "The tool word_count answered: 2"),
    ],
)
async def test_a_tool_is_called_and_its_result_told(client: httpx.AsyncClient, asked: str, told: str) -> None:
    """The graph goes from the assistant to the tool and back."""
    answer = await client.post(INVOKE, json=ask(asked))

    messages = answer.json()["data"]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert _text(messages[-1]) == told


async def test_a_tool_is_called_in_a_stream(client: httpx.AsyncClient) -> None:
    """A stream shows the call, the result and the deltas of the answer."""
    answer = await client.post(STREAM, json=ask("[tool add 2 3]"))

    messages = [line["message"] for line in _lines(answer)]
    called, result = messages[1:3]
    assert called["tools_calls"][0]["function"]["name"] == "add"
    assert (result["role"], result["content"][0]["output"]) == ("tool", "5")
    assert "".join(_text(message) for message in messages[3:-1]) == "The tool add answered: 5"


async def test_a_failure_in_a_stream_is_an_error_line(client: httpx.AsyncClient) -> None:
    """A stream that fails midway began as a success: the deltas before it stay, an error line follows."""
    answer = await client.post(STREAM, json=ask("[fail 2 the plug was pulled]"))

    assert answer.status_code == 200
    lines = _lines(answer)
    assert [_text(line["message"]) for line in lines if _by_assistant(line)] == ["w1 ", "w2 "]
    assert lines[-1]["event"] == "error"
    assert "the plug was pulled" in lines[-1]["data"]["reason"]


async def test_threads_survive_a_restart(tmp_path: Path) -> None:
    """A new process on the same database knows the old one's threads."""
    first = start_agent(tmp_path)
    async with _client(first) as client:
        await client.post(INVOKE, json=ask("the kettle is blue", "kept"))
    stop(first.process)

    second = start_agent(tmp_path)
    async with _client(second) as client:
        recalled = await client.post(INVOKE, json=ask("[recall]", "kept"))
    stop(second.process)

    assert first.process.returncode == -signal.SIGTERM
    assert _text(recalled.json()["data"]["messages"][-1]) == "the kettle is blue"


def test_an_agent_that_is_not_ready_takes_no_connection(tmp_path: Path) -> None:
    """As long as its graph is loading its port refuses, so that a balancer sends what comes to the others."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "slow.py").write_text(f"open({str(gate)!r}).read()\nfrom agent_service.graph import app\n")
    (tmp_path / "agentflow.json").write_text('{"agent": "slow:app"}')
    port = free_port()
    command = [*PRODUCTION, "--port", str(port), "--config", tmp_path / "agentflow.json"]
    variables = {"PATH": os.defpath, "AGENT_DATABASE": "memory", "JWT_SECRET_KEY": "s" * 32, "JWT_ALGORITHM": "HS256"}
    process = subprocess.Popen(command, env=variables, cwd=tmp_path)
    try:
        with gate.open("w"):  # which waits until it is read
            early = accepts(port)
        while not accepts(port):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        stop(process)

    assert not early


def accepts(port: int) -> bool:
    """Say whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_production_keeps_threads_apart_and_tokens_narrow(tmp_path: Path) -> None:
    """In production a thread is its owner's alone, and a token must be meant for this agent."""
    agent = start_agent(
        tmp_path, MODE="production", ORIGINS="https://app.example", JWT_ISSUER="proxy", JWT_AUDIENCE="agent"
    )
    meant = {"iss": "proxy", "aud": "agent"}
    async with _client(agent, **meant) as owner, _client(agent, "stranger", **meant) as stranger:
        said = await owner.post(INVOKE, json=ask("the kettle is blue", "owned"))
        taken = await stranger.post(INVOKE, json=ask("[recall]", "owned"))
        unmeant = await owner.post(
            INVOKE, json=ask("hi"), headers={"Authorization": f"Bearer {internal_token(agent.secret)}"}
        )
        documentation = await owner.get("/openapi.json")
    stop(agent.process)

    assert said.status_code == 200
    assert taken.is_error
    assert "kettle" not in taken.text
    assert unmeant.status_code == 401
    assert documentation.status_code == 404


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"AGENT_MODEL": "parrot"}, "AGENT_MODEL is 'parrot'; it must be 'local' or 'openai/<model>'."),
        ({"JWT_SECRET_KEY": "too short"}, "JWT_SECRET_KEY must be at least 32 bytes"),
        ({"AGENT_REDIS_URL": "redis://cache"}, "AGENT_POSTGRES_DSN is missing"),
    ],
)
def test_a_doubtful_environment_stops_the_start(tmp_path: Path, environment: dict[str, str], sentence: str) -> None:
    """The agent says in one sentence what is wrong, without a traceback, and exits."""
    with pytest.raises(AgentStoppedError) as stopped:
        start_agent(tmp_path, **environment)

    assert sentence in str(stopped.value)
    assert "Traceback" not in str(stopped.value)


@pytest.mark.parametrize("granularity", ["low", "partial", "full"])
async def test_what_a_run_used_is_read_from_what_passes_by(client: httpx.AsyncClient, granularity: str) -> None:
    """At each granularity an answer and a stream tell the same of this run alone, though the thread has an earlier."""
    for operation, kind in ((INVOKE, "answer"), (STREAM, "stream")):
        thread = f"usage-{granularity}-{kind}"
        await client.post(INVOKE, json=ask("an earlier run with a lot of words", thread))
        reader = reader_for(kind)  # type: ignore[arg-type]  # both are literals

        answer = await client.post(operation, json=ask("[tool add 2 3]", thread, response_granularity=granularity))
        for at in range(0, len(answer.content), 100):
            reader.feed(answer.content[at : at + 100])

        # The model is asked twice: with 22 words for the call (3), with 23 for what it says of the result (5).
        assert reader.usage() == Usage(45, 8, 53, estimated=False)
        assert (reader.turns, reader.errors) == (2, 0)


async def test_a_run_that_broke_off_is_estimated(client: httpx.AsyncClient) -> None:
    """Its deltas were spoken, its usage never reported; the errors are counted."""
    reader = reader_for("stream")

    answer = await client.post(STREAM, json=ask("[words 40] [fail 20]", response_granularity="full"))
    reader.feed(answer.content)

    assert reader.usage() == Usage(5, 18, 23, estimated=True)  # 20 bytes, and 71: "w1 " to "w20 "
    assert (reader.turns, reader.errors) == (0, 2)


async def test_most_lines_need_no_parsing_to_be_read(client: httpx.AsyncClient) -> None:
    """The sidecar writes its deltas as the reader of usage searches them: else each would cost ten times as much."""
    answer = await client.post(STREAM, json=ask("[words 3]"))

    deltas = [line for line in answer.content.splitlines() if b'"delta":true' in line]
    assert len(deltas) == 3
    for line in deltas:
        assert usage._MESSAGE in line
        assert usage._ASSISTANT in line
        assert usage._DELTA in line
        assert usage._USAGES not in line


def test_no_file_adds_to_the_environment(agent: Agent) -> None:
    """AgentFlow would read the first `.env` above its own package; ours is told to read an empty one."""
    log = agent.log.read_text()

    assert "environment: /dev/null" in log


def _client(agent: Agent, user_id: str = "tester", **claims: object) -> httpx.AsyncClient:
    token = internal_token(agent.secret, user_id, **claims)
    return httpx.AsyncClient(
        base_url=agent.url, headers={"Authorization": f"Bearer {token}"}, timeout=20.0, trust_env=False
    )


async def _deltas(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        message = json.loads(line)["message"]
        if message["delta"]:
            yield _text(message)


async def _whole_thread(client: httpx.AsyncClient, thread_id: str) -> str:
    answer = await client.post(INVOKE, json=ask("hello", thread_id, response_granularity="full"))
    return "".join(_text(message) for message in answer.json()["data"]["context"])


def _lines(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


def _by_assistant(line: dict[str, Any]) -> bool:
    return line["event"] == "message" and line["message"]["role"] == "assistant"


def _text(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")
