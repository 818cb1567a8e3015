"""Starts a real Prometheus by compose's command on the deployed configuration, and asks it as Grafana does.

It substitutes where Prometheus listens, how often it looks, and whom it asks: the system's resolver, which Prometheus
reads, does not know compose's names. The program is the distribution's, which may be older than compose's image.
"""

import json
import math
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.compose import BASE, DEPLOY, OBSERVE, command, merged
from tests.support.programs import require

CONFIGURED = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "agentflow-proxy.json"
DEADLINE = 30.0


class PrometheusStoppedError(Exception):
    """Prometheus exited, or never became ready; says so with its log."""


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, path: str, **parameters: str) -> Any:
        """Ask its API; give the data."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, query: str) -> list[float]:
        """Evaluate a query now; give what numbers it finds."""
        found = [float(series["value"][1]) for series in self.ask("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]


def panels() -> list[dict[str, Any]]:
    """Give the dashboard's panels, its rows too."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def filled(expression: str, *, interval: str = "1m") -> str:
    """Put values in the place of Grafana's variables: every proxy, and what a rate is taken over."""
    return expression.replace("$instance", ".*").replace("$__rate_interval", interval)


def start_prometheus(directory: Path, targets: Sequence[str], *, address: tuple[str, int]) -> Prometheus:
    """Start Prometheus in `directory`, asking `targets` (`host:port`) each second; wait until it is ready."""
    binary = require("prometheus", package="prometheus")
    config = yaml.safe_load((CONFIGURED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (directory / "alerts.yml").write_bytes((CONFIGURED / "alerts.yml").read_bytes())
    words = command(merged(BASE, OBSERVE)["services"]["prometheus"])
    words = [word.replace("=/etc/prometheus/", "=").replace("=/prometheus", "=data") for word in words]
    listening = "{}:{}".format(*address)
    log = directory / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [binary, *words, f"--web.listen-address={listening}"],
            cwd=directory, env={}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    prometheus = Prometheus(f"http://{listening}", process, log)
    try:
        _wait_until_ready(prometheus)
    except BaseException:
        stop_prometheus(prometheus)
        raise
    return prometheus


def stop_prometheus(prometheus: Prometheus) -> None:
    """End it at once."""
    prometheus.process.kill()
    prometheus.process.wait()


@contextmanager
def running_prometheus(directory: Path, targets: Sequence[str], *, address: tuple[str, int]) -> Iterator[Prometheus]:
    """Run Prometheus as long as the context lasts."""
    prometheus = start_prometheus(directory, targets, address=address)
    try:
        yield prometheus
    finally:
        stop_prometheus(prometheus)


def _wait_until_ready(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + DEADLINE
    with httpx.Client(timeout=1.0, trust_env=False) as client:
        while prometheus.process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if client.get(f"{prometheus.url}/-/ready").is_success:
                    return
            time.sleep(0.02)
    raise PrometheusStoppedError(prometheus.log.read_text(errors="replace")[-4000:])
