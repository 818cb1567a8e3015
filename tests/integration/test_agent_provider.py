"""The agent on a provider's model: AgentFlow's own `Agent` on a stand-in that speaks OpenAI's protocol."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from proxy.model import Usage
from proxy.usage import reader_for
from tests.support.agent import Agent, ask, internal_token, start_agent, stop
from tests.support.provider import Provider, stand_in

INVOKE = "/v1/graph/invoke"
STREAM = "/v1/graph/stream"


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    """One stand-in for the whole module."""
    with stand_in() as provider:
        yield provider


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, provider: Provider) -> Iterator[Agent]:
    """One agent that thinks with the stand-in."""
    agent = start_agent(
        tmp_path_factory.mktemp("agent"),
        AGENT_MODEL="openai/stand-in",
        OPENAI_BASE_URL=provider.url,
        OPENAI_API_KEY="provider-key",
    )
    yield agent
    stop(agent.process)


@pytest.fixture
def client(agent: Agent) -> Iterator[httpx.Client]:
    """Call with the proxy's own credentials."""
    headers = {"Authorization": f"Bearer {internal_token(agent.secret)}"}
    with httpx.Client(base_url=agent.url, headers=headers, timeout=20.0, trust_env=False) as client:
        yield client


def test_invoke_asks_the_provider(client: httpx.Client, provider: Provider) -> None:
    """The provider gets the model's name, its own key and no wish for reasoning; its usage comes back."""
    answer = client.post(INVOKE, json=ask("hello"))

    last = answer.json()["data"]["messages"][-1]
    assert _text(last) == "I heard hello"
    assert last["usages"]["total_tokens"] == 10
    asked = provider.requests[-1]
    assert asked["model"] == "stand-in"
    assert "reasoning_effort" not in asked
    assert provider.keys[-1] == "Bearer provider-key"


def test_a_stream_passes_each_delta_on(client: httpx.Client, provider: Provider) -> None:
    """The first word is with the client before the provider says the second."""
    provider.gate.clear()
    with client.stream("POST", STREAM, json=ask("one two")) as answer:
        lines = answer.iter_lines()
        next(lines)
        first = json.loads(next(lines))["message"]
        provider.gate.set()
        rest = [json.loads(line)["message"] for line in lines]

    assert (_text(first), first["delta"]) == ("I ", True)
    assert [_text(message) for message in rest if message["delta"]] == ["heard ", "one ", "two", ""]
    assert (_text(rest[-1]), rest[-1]["delta"]) == ("I heard one two", False)


def test_a_stream_whose_usage_nobody_reports_is_estimated(client: httpx.Client) -> None:
    """AgentFlow asks the provider for no usage in a stream: what was said counts, four bytes a token."""
    invoked, streamed = reader_for("answer"), reader_for("stream")

    invoked.feed(client.post(INVOKE, json=ask("one two")).content)
    streamed.feed(client.post(STREAM, json=ask("one two")).content)

    assert invoked.usage() == Usage(7, 3, 10, estimated=False)
    assert streamed.usage() == Usage(2, 4, 6, estimated=True)


def test_a_closed_stream_stops_the_provider(client: httpx.Client, provider: Provider) -> None:
    """When the client leaves, the agent leaves the provider too, and no more words are paid for."""
    provider.gate.clear()
    with client.stream("POST", STREAM, json=ask("one two")) as answer:
        lines = answer.iter_lines()
        next(lines)
        next(lines)

    left = provider.abandoned.wait(timeout=20)

    provider.gate.set()
    assert left


@pytest.mark.parametrize("operation", [INVOKE, STREAM])
def test_the_provider_may_call_a_tool(client: httpx.Client, provider: Provider, operation: str) -> None:
    """The model is offered the tools, calls one through the graph, and is given the result."""
    answer = client.post(operation, json=ask("add 2 3"))

    offer, outcome = provider.requests[-2:]
    assert {tool["function"]["name"] for tool in offer["tools"]} == {"add", "word_count"}
    assert (outcome["messages"][-1]["role"], outcome["messages"][-1]["content"]) == ("tool", "5")
    assert "The tool said 5" in answer.text


def test_a_thread_is_told_to_the_provider(client: httpx.Client, provider: Provider) -> None:
    """Each turn carries the turns before it."""
    client.post(INVOKE, json=ask("first", "turns"))

    client.post(STREAM, json=ask("second", "turns"))

    told = [message["content"] for message in provider.requests[-1]["messages"]]
    assert told == ["first", "I heard first", "second"]


def _text(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")
