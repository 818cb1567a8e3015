"""A log that nobody reads: the proxy's output is a pipe that is full, and requests are answered all the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.support.principals import Principals

REQUESTS = 600


def test_requests_are_answered_while_nobody_reads_the_log(tmp_path: Path) -> None:
    """Its lines fill the pipe several times over; every answer comes, and the process still ends when asked."""
    environment = {
        "PATH": os.defpath, "HOME": str(tmp_path), "PYTHONWARNINGS": "error", "PROXY_PORT": "0",
        "PROXY_AGENT_SECRET": "s" * 48, **Principals().environment(),
    }  # fmt: skip
    command = [Path(sys.executable).with_name("agentflow-proxy"), "serve"]
    proxy = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert proxy.stdout is not None
        started = json.loads(proxy.stdout.readline())
        url = f"http://{started['listening'][0]}/health/live?"

        with httpx.Client(timeout=10) as client:
            for _ in range(REQUESTS):
                assert client.get(url).status_code == 200

        proxy.send_signal(signal.SIGTERM)
        assert proxy.wait(20) == 0
    finally:
        proxy.kill()
        proxy.communicate()
