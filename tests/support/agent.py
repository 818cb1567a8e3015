"""Starts the real agent, `agentflow api`, as a process on a free port, and stops it again.

It never passes the caller's own environment on, and never waits by sleeping for a fixed time.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import jwt

CONFIG = Path(__file__).parents[2] / "agent_service" / "agentflow.json"
LAUNCHER = (str(Path(sys.executable).with_name("agentflow")), "api", "--no-reload")
PRODUCTION = (sys.executable, "-m", "agent_service.serve")
DEADLINE = 60.0
TAIL = 4000


class AgentStoppedError(Exception):
    """The agent exited, or never became ready; says so with the end of its log."""


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent and the secret it trusts."""

    url: str
    secret: str
    process: subprocess.Popen[bytes]
    log: Path


def start_agent(
    directory: Path,
    *,
    at: tuple[str, int] | Path = ("127.0.0.1", 0),
    launcher: Sequence[str] = LAUNCHER,
    **environment: str,
) -> Agent:
    """Start an agent that keeps its threads and its log in `directory`, and wait until it answers.

    It listens at `at`, a port or a Unix socket, which takes PRODUCTION; `launcher` is the command that does so.
    `environment` adds to the agent's variables or replaces them; an empty value takes one away.
    """
    secret = environment.get("JWT_SECRET_KEY", secrets.token_urlsafe(48))
    variables = {
        "PATH": os.defpath,
        "HOME": str(directory),
        "PYTHONUNBUFFERED": "1",
        "JWT_SECRET_KEY": secret,
        "JWT_ALGORITHM": "HS256",
        "AGENT_DATABASE": str(directory / "threads.sqlite"),
        **environment,
    }
    if isinstance(at, Path):
        url, place = f"http+unix://{at}", ("--uds", str(at))
    else:
        host, port = at[0], at[1] or free_port()
        url, place = f"http://{host}:{port}", ("--host", host, "--port", str(port))
    log = directory / f"agent-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*launcher, *place, "--config", CONFIG],
            cwd=directory,
            env={name: value for name, value in variables.items() if value},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    agent = Agent(url=url, secret=secret, process=process, log=log)
    try:
        _wait_until_ready(agent)
    except BaseException:
        stop(process)
        raise
    return agent


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, wait for it, and kill it if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def internal_token(secret: str, user_id: str = "tester", **claims: object) -> str:
    """Sign the token the proxy would send for this user; `claims` are added or replaced."""
    return jwt.encode({"user_id": user_id, "exp": int(time.time()) + 60, **claims}, secret, algorithm="HS256")


def ask(text: str, thread_id: str | None = None, **more: object) -> dict[str, object]:
    """Make the body of an invoke or a stream in which the user says `text`; `more` adds to it."""
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    config = {} if thread_id is None else {"thread_id": thread_id}
    return {"messages": [message], "config": config, **more}


def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(agent: Agent) -> None:
    """Poll /ping; the agent's own word that it listens tells it from a stranger on the same port."""
    deadline = time.monotonic() + DEADLINE
    path = agent.url.removeprefix("http+unix://")
    base = agent.url if path == agent.url else "http://localhost"
    transport = httpx.HTTPTransport(uds=path) if path != agent.url else None
    with httpx.Client(base_url=base, transport=transport, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if agent.process.poll() is not None:
                message = f"the agent exited with {agent.process.returncode}:\n{_tail(agent.log)}"
                raise AgentStoppedError(message)
            if f"running on {agent.url}" in agent.log.read_text(errors="replace"):
                with suppress(httpx.TransportError):
                    if client.get("/ping").is_success:
                        return
            time.sleep(0.05)
    message = f"the agent was not ready in {DEADLINE:.0f} s:\n{_tail(agent.log)}"
    raise AgentStoppedError(message)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-TAIL:]
