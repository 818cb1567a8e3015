"""How late events are through the whole chain: nginx as deployed, the proxy, a real sidecar process.

Prints one line of figures; it starts everything on free ports and stops it again.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.support.agent import start_agent
from tests.support.agent import stop as stop_agent
from tests.support.nginx import start_nginx
from tests.support.nginx import stop as stop_nginx
from tests.support.principals import Principals
from tests.support.proxy import start_proxy, stop_proxy

EVENTS = 200
PACE_MS = 20


def measure_lateness(url: str, token: str) -> list[float]:
    """Stream once; give each delta's arrival minus the model's own timestamp in it, in seconds."""
    body = {"text": f"[words {EVENTS}] [pace {PACE_MS}ms]"}
    lateness: list[float] = []
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.stream("POST", f"{url}/agent/stream", json=body, headers=headers, timeout=60) as answer:
        for line in answer.iter_lines():
            arrived = time.time()
            message = json.loads(line)["message"]
            if message["delta"]:
                lateness.append(arrived - message["timestamp"])
    return lateness


def main() -> None:
    """Start the chain, measure, print."""
    principals = Principals()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        agent = start_agent(directory)
        proxy = start_proxy(directory, agent.url, agent.secret, **principals.environment())
        nginx = start_nginx(directory, proxy.url)
        try:
            lateness = sorted(measure_lateness(nginx.url, principals.token("bench")))
        finally:
            stop_nginx(nginx)
            stop_proxy(proxy.process)
            stop_agent(agent.process)
    median, p99, most = statistics.median(lateness), lateness[int(len(lateness) * 0.99)], lateness[-1]
    print(f"{len(lateness)} events paced at {PACE_MS} ms: ", end="")
    print(f"late by {median * 1000:.1f} ms at the median, {p99 * 1000:.1f} at p99, {most * 1000:.1f} at most")


if __name__ == "__main__":
    main()
