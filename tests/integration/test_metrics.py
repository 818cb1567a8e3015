"""What a running proxy counts: /metrics on its port, asked as Prometheus asks, after requests of every kind."""

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from proxy.families import FAMILIES, PREFIX
from tests.security.wire import json_answer, stub_upstream
from tests.support.agent import free_port
from tests.support.compose import BASE, OBSERVE, merged
from tests.support.principals import Principals
from tests.support.programs import require
from tests.support.prometheus import CONFIGURED, running_prometheus
from tests.support.proxy import Proxy, start_proxy, stop_proxy

ROOT = Path(__file__).parents[2]
SECRET = "s" * 48
"""What the proxy shares with the sidecar."""
MESSAGE = {
    "message_id": "m", "role": "assistant", "content": [{"type": "text", "text": "hi"}],
    "usages": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
}  # fmt: skip
ANSWER = json.dumps({"data": {"messages": [MESSAGE], "meta": {"thread_id": "t"}}, "metadata": {}}).encode()
NAME = re.compile(r"\b(?:agent_proxy|process)_[a-z0-9_]+")

type Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(url: str) -> tuple[Samples, set[str]]:
    """Read /metrics; give each sample, and the names of the families and their samples."""
    families = list(text_string_to_metric_families(httpx.get(url).raise_for_status().text))
    samples = {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}
    return samples, {name for name, _ in samples}


@dataclass(frozen=True, slots=True)
class House:
    """A proxy that serves metrics, and who may call it."""

    proxy: Proxy
    principals: Principals

    def ask(self, path: str, body: object = None, *, token: str | None = None, method: str = "POST") -> int:
        """Send a request; give its status."""
        head = {"authorization": f"Bearer {token}"} if token is not None else {}
        return httpx.request(method, self.proxy.url + path, json=body, headers=head).status_code


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Run it, and send it requests that are answered, refused, and none at all."""
    principals = Principals()
    with stub_upstream(lambda _: json_answer(ANSWER)) as agent:
        proxy = start_proxy(
            tmp_path_factory.mktemp("proxy"), agent.url, SECRET,
            **principals.environment(), PROXY_METRICS_PORT="0", PROXY_RATE_LIMIT="8/day",
        )  # fmt: skip
        try:
            house = House(proxy, principals)
            alice = principals.token("alice-of-accounts")
            assert [house.ask("/agent/invoke", {"text": "hi"}, token=alice) for _ in range(3)] == [200] * 3
            assert house.ask("/agent/stream", {"text": "hi"}, token=alice) == 200
            assert house.ask("/agent/ping", token=alice, method="GET") == 200
            assert house.ask("/agent/invoke", {"text": 5}, token=alice) == 422
            assert house.ask("/agent/secret-path-of-alice", token=alice, method="GET") == 404
            assert house.ask("/agent/invoke", {"text": "hi"}, method="PROPFIND", token=alice) == 405
            assert house.ask("/agent/invoke", {"text": "hi"}) == 401
            assert [house.ask("/agent/ping", token=alice, method="GET") for _ in range(4)][-1] == 429
            with socket.create_connection(proxy.url.removeprefix("http://").split(":"), 10) as garbage:  # type: ignore[arg-type]
                garbage.sendall(b"\x16\x03\x01 tls?\r\n\r\n")
                assert garbage.recv(100).startswith(b"HTTP/1.1 400")
            proxy.line_of(status=400)
            yield house
        finally:
            stop_proxy(proxy.process)


def value(samples: Samples, name: str, **labels: str) -> float:
    """Give one sample."""
    return samples[PREFIX + name, frozenset(labels.items())]


def test_every_kind_of_request_is_counted(house: House) -> None:
    """Answered, refused by each room, and bytes that were no request."""
    samples, _ = scrape(house.proxy.metrics_url)

    def requests(operation: str, method: str, status: str, credential: str) -> float:
        return value(
            samples, "requests_total", operation=operation, method=method, status=status, credential=credential
        )

    assert requests("invoke", "POST", "200", "jwt") == 3
    assert requests("stream", "POST", "200", "jwt") == 1
    assert requests("invoke", "POST", "422", "jwt") == 1
    assert requests("none", "GET", "404", "jwt") == 1
    assert requests("none", "other", "405", "jwt") == 1
    assert requests("none", "POST", "401", "none") == 1
    assert requests("none", "other", "400", "none") == 1
    assert requests("ping", "GET", "429", "jwt") >= 1
    assert value(samples, "limit_decisions_total", policy="requests", outcome="refused") >= 1
    assert value(samples, "runs_total", operation="invoke", end="done") == 3
    assert value(samples, "stream_end_total", reason="done") == 1
    assert value(samples, "problems_total", code="rate_exceeded", fault="client") >= 1


def test_times_and_bytes_are_measured(house: House) -> None:
    """Histograms count each request once, within its operation; bytes are those of bodies."""
    samples, _ = scrape(house.proxy.metrics_url)

    assert value(samples, "request_duration_seconds_count", operation="invoke") == 4
    assert value(samples, "run_duration_seconds_count", operation="invoke") == 3
    assert value(samples, "run_duration_seconds_bucket", operation="invoke", le="+Inf") == 3
    assert value(samples, "time_to_first_byte_seconds_sum", operation="stream") > 0
    assert value(samples, "received_bytes_total", operation="stream") == len(b'{"text":"hi"}')
    assert value(samples, "sent_bytes_total", operation="stream") > 0


def test_what_runs_have_used_is_counted(house: House) -> None:
    """Tokens as the agent reported them, and the assistant's messages."""
    samples, _ = scrape(house.proxy.metrics_url)

    def tokens(direction: str) -> float:
        return value(samples, "model_tokens_total", operation="invoke", direction=direction, estimated="false")

    assert (tokens("input"), tokens("output")) == (21, 15)
    assert value(samples, "turns_total", operation="invoke") == 3


def test_the_state_of_the_process_is_told(house: House) -> None:
    """Gauges say how it is now; nothing is in flight any more."""
    samples, _ = scrape(house.proxy.metrics_url)

    assert [value(samples, name) for name in ("ready", "key_store_up", "workers")] == [1, 1, 1]
    assert value(samples, "limiter_degraded") == 0
    assert [value(samples, name) for name in ("requests_in_flight", "streams_active", "log_lines_dropped_total")] == [
        0
    ] * 3
    assert value(samples, "upstream_connections", state="busy") == 0
    assert samples["process_resident_memory_bytes", frozenset()] > 1e6


def test_what_has_not_happened_yet_is_told(house: House) -> None:
    """A rate sees the first time of what was at 0 before: cut streams, and problems of every code, with their fault."""
    samples, _ = scrape(house.proxy.metrics_url)

    assert [value(samples, "stream_end_total", reason=reason) for reason in ("upstream_cut", "idle_deadline")] == [0, 0]
    assert value(samples, "runs_total", operation="ag-ui", end="upstream_unreachable") == 0
    assert value(samples, "problems_total", code="overloaded", fault="proxy") == 0
    assert value(samples, "problems_total", code="upstream_distrust", fault="upstream") == 0


def test_no_label_says_who_called(house: House) -> None:
    """Neither a name, nor a path, nor an address; and no method that a caller made up."""
    text = httpx.get(house.proxy.metrics_url).text

    assert not [word for word in ("alice", "secret-path", "127.0.0.1", "PROPFIND", "key:", "jwt:") if word in text]


def test_only_metrics_are_on_that_port(house: House) -> None:
    """No other path, and the public port has no /metrics."""
    elsewhere = httpx.get(house.proxy.metrics_url.replace("/metrics", "/agent/ping"))

    assert elsewhere.status_code == 404
    assert house.ask("/metrics", method="GET") == 401


def test_prometheus_asks_by_composes_command(house: House, tmp_path: Path) -> None:
    """Its health check says that it is well, it reads what the proxy tells, and an alert that is due is pending."""
    service = merged(BASE, OBSERVE)["services"]["prometheus"]
    told = house.proxy.metrics_url.removeprefix("http://").removesuffix("/metrics")
    nobody = f"127.0.0.1:{free_port()}"
    with running_prometheus(tmp_path, [told, nobody], address=("127.0.0.1", free_port())) as prometheus:
        health = httpx.get(service["healthcheck"]["test"][-1].replace("http://127.0.0.1:9090", prometheus.url))
        deadline = time.monotonic() + 30
        while len(prometheus.values("up")) < 2 or not (alerts := prometheus.ask("alerts")["alerts"]):
            assert time.monotonic() < deadline, prometheus.ask("rules")
            time.sleep(0.1)
        up = {
            series["metric"]["instance"]: series["value"][1] for series in prometheus.ask("query", query="up")["result"]
        }
        counted = prometheus.values('agent_proxy_requests_total{operation="invoke",status="200"}')
        prometheus.process.send_signal(signal.Signals[service["stop_signal"]])
        status = prometheus.process.wait(30)

    assert health.status_code == 200
    assert up == {told: "1", nobody: "0"}
    assert counted == [3]
    assert [(alert["labels"]["alertname"], alert["labels"]["instance"], alert["state"]) for alert in alerts] == [
        ("ProxyDown", nobody, "pending")
    ]
    assert status == 0


def test_prometheuss_own_tool_has_nothing_to_say() -> None:
    """`promtool` reads the configuration as it is deployed, and every rule in it."""
    words = [require("promtool", package="prometheus"), "check", "config", CONFIGURED / "prometheus.yml"]
    (group,) = yaml.safe_load((CONFIGURED / "alerts.yml").read_text())["groups"]

    checked = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)

    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"{len(group['rules'])} rules found" in checked.stdout


def queries() -> dict[str, set[str]]:
    """Give the metrics that the dashboards and alert rules name, by file."""
    found = {}
    for path in (*ROOT.glob("deploy/grafana/**/*.json"), CONFIGURED / "alerts.yml"):
        found[path.name] = set(NAME.findall(path.read_text()))
    return found


def test_dashboards_and_alerts_name_metrics_that_exist(house: House) -> None:
    """A renamed metric cannot leave an alert behind that never fires."""
    _, names = scrape(house.proxy.metrics_url)
    declared = set(re.findall(r"^# TYPE (\w+)", httpx.get(house.proxy.metrics_url).text, re.MULTILINE))
    named = queries()

    assert {"agentflow-proxy.json", "alerts.yml"} <= set(named)
    for file, metrics in named.items():
        assert metrics, file
        assert metrics - names - declared == set(), file


def test_grafana_knows_every_member_of_the_dashboard() -> None:
    """Read into Grafana's own model and written again, nothing of the file is lost or changed."""
    register_default_plugins()
    written = json.loads((ROOT / "deploy" / "grafana" / "agentflow-proxy.json").read_text())

    known = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))

    assert lost(written, known) == []


def lost(written: Any, known: Any, at: str = "") -> list[str]:
    """Give where something that was written is not known so; what the model adds does not count."""
    if isinstance(written, dict) and isinstance(known, dict):
        return [each for name in written for each in lost(written[name], known.get(name), f"{at}/{name}")]
    if isinstance(written, list) and isinstance(known, list) and len(written) == len(known):
        return [
            each
            for number, pair in enumerate(zip(written, known, strict=True))
            for each in lost(*pair, f"{at}/{number}")
        ]
    return [] if written == known else [at]


def test_every_metric_is_documented() -> None:
    """docs/observability.md has each metric with its labels, and none that does not exist."""
    text = (ROOT / "docs" / "observability.md").read_text()
    rows = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(\w+)` \|([^|]*)\|", text, re.MULTILINE)
    }
    rows = {name: labels for name, labels in rows.items() if name.startswith(("agent_proxy_", "process_"))}
    known: dict[str, Any] = {}
    for family in FAMILIES.values():
        prefix = "" if family.name.startswith("process_") else PREFIX
        known[prefix + family.name + ("_total" if family.kind == "counter" else "")] = set(family.labels)

    assert rows == known


def test_every_alert_says_what_to_do() -> None:
    """Each rule has a severity, a sentence, and a section of the documentation that exists."""
    (group,) = yaml.safe_load((CONFIGURED / "alerts.yml").read_text())["groups"]
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs" / "observability.md").read_text(), re.MULTILINE)

    assert len(group["rules"]) >= 8
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/observability.md#{rule['alert'].lower()}"
        assert rule["alert"] in sections
