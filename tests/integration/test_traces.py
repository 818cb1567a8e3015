"""Traces as a collector gets them: the real exporter of a running proxy, and a collector on a socket."""

import gzip
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.security.wire import Stub, json_answer, stub_upstream
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

SECRET = "s" * 48
"""What the proxy shares with the sidecar."""
PROMPT = "words that only the agent may read"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ANSWER = json.dumps({"data": {"messages": [], "meta": {"thread_id": "t"}}, "metadata": {}}).encode()


@dataclass
class Collector:
    """Takes what is exported to it."""

    url: str = ""
    raw: list[bytes] = field(default_factory=list)

    def spans(self, trace: str, number: int) -> dict[str, Any]:
        """Wait for the spans of a trace, so many of them; by name."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = {}
            for body in list(self.raw):
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        found |= {span.name: span for span in scope.spans if span.trace_id.hex() == trace}
            if len(found) >= number:
                return found
            time.sleep(0.05)
        raise AssertionError(f"{len(self.raw)} exports, and not all of {trace}")


@dataclass(frozen=True, slots=True)
class House:
    """A proxy that traces, the agent behind it, the collector, and who may call."""

    proxy: Proxy
    agent: Stub
    collector: Collector
    principals: Principals

    def run(self, *, traceparent: str | None = None, path: str = "/agent/invoke") -> httpx.Response:
        """Run the agent."""
        head = {"authorization": f"Bearer {self.principals.token('alice-of-accounts')}"}
        if traceparent is not None:
            head["traceparent"] = traceparent
        return httpx.post(self.proxy.url + path, json={"text": PROMPT, "thread_id": "support-42"}, headers=head)

    def told(self) -> str:
        """Give the traceparent that the agent was sent last; empty without one."""
        found = re.search(rb"\r\ntraceparent: ([^\r]*)", self.agent.requests[-1])
        return found[1].decode() if found else ""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Run it."""
    taken = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            taken.raw.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        taken.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield taken
        server.shutdown()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[House]:
    """Run a proxy that traces everything, whatever callers say."""
    yield from _house(tmp_path_factory.mktemp("proxy"), collector, PROXY_TRACE_SAMPLE_RATIO="1")


def _house(directory: Path, collector: Collector, **settings: str) -> Iterator[House]:
    principals = Principals()

    def respond(request: bytes) -> bytes:
        return json_answer(ANSWER)

    with stub_upstream(respond) as agent:
        environment = {"PROXY_OTLP_URL": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100", **settings}
        proxy = start_proxy(directory, agent.url, SECRET, **principals.environment(), **environment)
        try:
            yield House(proxy, agent, collector, principals)
        finally:
            stop_proxy(proxy.process)


def values(span: Any) -> dict[str, Any]:
    """Give a span's attributes."""
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_run_is_one_trace_from_the_caller_to_the_agent(house: House) -> None:
    """Server span below the caller's, phases and client span below that; the agent's parent is the client span."""
    house.run(traceparent=f"00-{TRACE}-00f067aa0ba902b7-00").raise_for_status()
    spans = house.collector.spans(TRACE, 5)
    server, client = spans["POST invoke"], spans["invoke_agent"]

    assert set(spans) == {"POST invoke", "authentication", "policy", "limit", "invoke_agent"}
    assert server.parent_span_id.hex() == "00f067aa0ba902b7"
    assert {span.parent_span_id for span in spans.values() if span is not server} == {server.span_id}
    assert house.told() == f"00-{TRACE}-{client.span_id.hex()}-01"
    assert (server.kind, client.kind) == (2, 3)


AG_UI = {"threadId": "support-42", "runId": "r", "messages": [{"id": "m", "role": "user", "content": PROMPT}]}
FORM = {"file": ("a.txt", b"a file", "text/plain")}


@pytest.mark.parametrize(
    ("path", "sent", "name"),
    [("/agent/v1/ag-ui", {"json": AG_UI}, "invoke_agent"), ("/agent/v1/files/upload", {"files": FORM}, "POST")],
)
def test_runs_over_ag_ui_and_files_are_traced_too(house: House, path: str, sent: dict[str, Any], name: str) -> None:
    """The agent's parent is our client span there as well, and a run names its thread."""
    trace = name[0].lower().encode().hex().ljust(32, "8")
    head = {"authorization": f"Bearer {house.principals.token('alice')}"}
    httpx.post(house.proxy.url + path, headers=head | {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}, **sent)
    client = house.collector.spans(trace, 5)[name]

    assert house.told() == f"00-{trace}-{client.span_id.hex()}-01"
    assert values(client)["url.template"] == path.removeprefix("/agent")
    assert values(client).get("gen_ai.conversation.id", "~support-42").endswith("~support-42")


def test_spans_say_what_was_done_and_how_long_it_took(house: House) -> None:
    """OpenTelemetry's names for HTTP and for agents; the phases follow each other within the server's span."""
    trace = TRACE.replace("4", "5")
    house.run(traceparent=f"00-{trace}-00f067aa0ba902b7-01").raise_for_status()
    spans = house.collector.spans(trace, 5)
    server, client = values(spans["POST invoke"]), values(spans["invoke_agent"])

    assert server["http.request.method"] == "POST"
    assert server["http.response.status_code"] == 200
    assert server["agent_proxy.operation"] == "invoke"
    assert client["gen_ai.operation.name"] == "invoke_agent"
    assert client["gen_ai.conversation.id"].endswith("~support-42")
    assert 0 < client["agent_proxy.time_to_first_byte"] < 30
    order = [spans[name] for name in ("authentication", "policy", "limit", "invoke_agent")]
    assert [span.start_time_unix_nano for span in order] == sorted(span.start_time_unix_nano for span in order)
    assert all(spans["POST invoke"].end_time_unix_nano >= span.end_time_unix_nano for span in order)


def test_a_refusal_is_a_trace_of_its_own(house: House) -> None:
    """Without a traceparent a new trace begins; what never reached the agent has no client span."""
    answer = httpx.get(
        house.proxy.url + "/agent/ping", headers={"traceparent": "00-" + "6" * 32 + "-" + "7" * 16 + "-01"}
    )
    spans = house.collector.spans("6" * 32, 1)

    assert answer.status_code == 401
    assert set(spans) == {"GET"}
    assert values(spans["GET"])["error.type"] == "credential_missing"


@pytest.mark.parametrize(
    "wrong", ["", "00-0-0-01", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-{TRACE.upper()}-00f067aa0ba902b7-01"]
)
def test_a_malformed_traceparent_is_not_passed_on(house: House, wrong: str) -> None:
    """It is as if there were none (W3C Trace Context, 3.2.2): the agent is told of ours."""
    house.run(traceparent=wrong).raise_for_status()

    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", house.told())
    assert wrong not in ("", house.told())[1:]


def test_no_span_holds_a_secret_or_a_prompt_or_a_name(house: House) -> None:
    """Of everything that was exported."""
    house.run(traceparent=f"00-{'a' * 32}-00f067aa0ba902b7-01").raise_for_status()
    house.collector.spans("a" * 32, 5)
    exported = b"".join(house.collector.raw)

    for secret in (PROMPT, "eyJ", "alice", SECRET, house.principals.jwt_secret, "127.0.0.1"):
        assert secret.encode() not in exported


def test_a_caller_cannot_ask_to_be_traced(tmp_path: Path, collector: Collector) -> None:
    """With a ratio of zero nothing is exported, and the caller's own traceparent goes on as it came."""
    mark = f"00-{'b' * 32}-00f067aa0ba902b7-01"
    for house in _house(tmp_path, collector, PROXY_TRACE_SAMPLE_RATIO="0"):
        house.run(traceparent=mark).raise_for_status()
        told = house.told()

    assert told == mark
    assert not any(b"\xbb" * 16 in body for body in collector.raw)


def test_a_gateway_that_samples_can_be_followed(tmp_path: Path, collector: Collector) -> None:
    """Then its flag decides, both ways, whatever the ratio is; and the last spans are sent when the proxy ends."""
    settings = {"PROXY_TRACE_FOLLOW_CALLER": "true", "PROXY_TRACE_SAMPLE_RATIO": "0"}
    for house in _house(tmp_path, collector, **settings, OTEL_BSP_SCHEDULE_DELAY="60000"):
        house.run(traceparent=f"00-{'c' * 32}-00f067aa0ba902b7-01").raise_for_status()
        house.run(traceparent=f"00-{'d' * 32}-00f067aa0ba902b7-00").raise_for_status()
        house.proxy.line_of(end="done")

    assert len(collector.spans("c" * 32, 5)) == 5
    assert not any(b"\xdd" * 16 in body for body in collector.raw)
