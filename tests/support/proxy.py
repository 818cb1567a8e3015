"""Starts the real proxy, `agentflow-proxy serve`, as a process on a free port, and stops it again.

It never passes the caller's own environment on, and never waits by sleeping for a fixed time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE = 30.0


class ProxyStoppedError(Exception):
    """The proxy exited, or never became ready; says so with its log."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy; `log` is where its lines go."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_lines(self) -> list[dict[str, Any]]:
        """Read the whole lines logged so far."""
        text = self.log.read_text(errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def metrics_url(self) -> str:
        """Where it said that it serves its metrics."""
        started = next(line for line in self.log_lines() if line["event"] == "server.started")
        return f"http://{started['metrics']}/metrics"

    def has_answered(self) -> bool:
        """Say whether a caller's request has ended here; whoever waited until it is ready has asked for its health."""
        return any(line["event"] == "request.finished" and line["operation"] for line in self.log_lines())

    def line_of(self, **fields: object) -> dict[str, Any]:
        """Wait for the access line that has these fields: it is written after the answer's last byte."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            for line in self.log_lines():
                if line["event"] == "request.finished" and fields.items() <= line.items():
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no access line with {fields}")


def start_proxy(directory: Path, agent_url: str, agent_secret: str, *options: str, **environment: str) -> Proxy:
    """Start a proxy before the sidecar at `agent_url`, logging into `directory`, and wait until it listens.

    The port is one the system chose; the proxy tells it in its log. An empty value of `environment` is unset.
    """
    variables = {
        "PATH": os.defpath,
        "HOME": str(directory),
        "PYTHONWARNINGS": "error",
        "PROXY_PORT": "0",
        "PROXY_AGENT_URL": agent_url,
        "PROXY_AGENT_SECRET": agent_secret,
        **environment,
    }
    log = directory / f"proxy-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("agentflow-proxy"), "serve", *options],
            cwd=directory,
            env={name: value for name, value in variables.items() if value},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        return Proxy(f"http://{_wait_until_listening(process, log)}", process, log)
    except BaseException:
        stop_proxy(process)
        raise


def stop_proxy(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, twice if need be, and wait for it."""
    for ask in (lambda: process.send_signal(signal.SIGTERM), lambda: process.send_signal(signal.SIGTERM), process.kill):
        if process.poll() is None:
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
    process.wait()


def _wait_until_listening(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event["event"] == "server.started":
                    return str(event["listening"][0])
        time.sleep(0.01)
    raise ProxyStoppedError(f"exit status {process.poll()}: {log.read_text(errors='replace')[-4000:]}")
