"""Every service of the compose files starts with the command, the variables and the health check it has there.

No engine runs: each command is run as a process of what its image holds, at an address of its own with the ports that
compose names; only paths and hosts are put in place of the container's. Postgres and Redis are those of the tests.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.checkpoints import running_postgres, running_redis
from tests.support.compose import BASE, DEPLOY, ROOT, SCALE, command, environment, merged
from tests.support.names import Names, running_names
from tests.support.nginx import BALANCER, CONFIG, Nginx, start_nginx
from tests.support.nginx import stop as stop_nginx
from tests.support.principals import Principals

pytestmark = pytest.mark.timeout(180)
PATIENCE = 60.0
SETUPS = ("agent-setup", "proxy-setup")


@dataclass(slots=True)
class Composed:
    """The services of a deployment, started in the order in which they need one another."""

    directory: Path
    services: dict[str, Any]
    names: Names
    principals: Principals
    key: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    nginx: dict[str, Nginx] = field(default_factory=dict)

    def address(self, service: str) -> str:
        """Give the loopback address that stands for a service's container."""
        return f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}.{list(self.services).index(service) + 1}"

    def here(self, text: str, service: str) -> str:
        """Put this machine's paths and addresses in place of the containers'."""
        text = text.replace("/run/secrets", str(self.directory / "secrets")).replace("/data/", f"{self.directory}/")
        text = text.replace("/etc/agentflow/", f"{ROOT}/agent_service/")
        text = re.sub(r"//(\w+):(\d+)$", lambda match: f"//{self.address(match[1])}:{match[2]}", text)
        return text.replace("0.0.0.0", self.address(service)).replace("127.0.0.1", self.address(service))  # noqa: S104

    def variables(self, service: str) -> dict[str, str]:
        """Give a service's environment, and what its image adds."""
        own = {name: self.here(value, service) for name, value in environment(self.services[service]).items()}
        if "ALLOWED_HOST" in own:
            own["ALLOWED_HOST"] += "," + ",".join(self.address(each) for each in self.services)
        image = ROOT / ".images" / service.partition("-")[0]
        assert (image / "bin").is_dir(), "run: make .images/.installed"
        path = f"{image}/bin:{os.defpath}"
        return {"PATH": path, "HOME": str(self.directory), "PYTHONUNBUFFERED": "1"} | own

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """Run a service's command, through its image's entrypoint."""
        words = [self.here(word, service) for word in command(self.services[service])]
        if service.startswith("agent"):
            words = ["/bin/sh", str(DEPLOY / "agent-entrypoint.sh"), *words]
        with (self.directory / f"{service}.log").open("wb") as log:
            self.processes[service] = subprocess.Popen(
                words, cwd=self.directory, env=self.variables(service), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self.processes[service]

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
        words = [self.here(word, service) for word in self.services[service]["healthcheck"]["test"][1:]]
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
def composed(directory: Path, *files: str) -> Iterator[Composed]:
    """Run the services of these files; stop whatever is left of them at the end."""
    with contextlib.ExitStack() as stack:
        principals = Principals()
        key = principals.key("first")
        made = {name: secrets.token_urlsafe(48) for name in ("agent_secret", "thread_secret")}
        made |= {"jwt_secret": principals.jwt_secret, "api_keys": "\n".join(principals.entries)}
        if SCALE in files:
            postgres = stack.enter_context(running_postgres())
            redis = stack.enter_context(running_redis())
            dsn = f"postgresql://proxy@127.0.0.1:{postgres.port}/postgres"
            made |= {"agent_postgres_dsn": dsn, "agent_redis_url": redis.url, "proxy_database_url": postgres.url}
            made["proxy_redis_url"] = redis.url.replace("/0", "/1")
        (directory / "secrets").mkdir()
        for name, content in made.items():
            (directory / "secrets" / name).write_text(f"{content}\n")
        names = stack.enter_context(running_names())
        running = Composed(directory, merged(*files)["services"], names, principals, key)
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
    """Set-up, agent, balancer, proxy, nginx: each comes up healthy, a call goes through them all, each ends in time."""
    with composed(tmp_path, *files) as running:
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
        statuses = [end(running, name) for name in ("proxy", "agent")]

    assert [answer.status_code for answer in (*answers, listed)] == [200, 200, 200], answers[0].text
    assert answers[1].json()["data"]["messages"][-1]["content"][0]["text"] == "a fig"
    assert len(listed.json()["data"]["threads"]) == 1
    assert set(named) == {200}
    assert statuses == [0, -signal.SIGTERM]


def asked_by_name(running: Composed, name: str) -> int:
    """Ask the agent, or the balancer before it, under the name that the proxy has for it; give the status."""
    return httpx.get(f"http://{running.address(name)}:8001/ping", headers={"Host": f"{name}:8001"}).status_code


def end(running: Composed, service: str) -> int:
    """Stop a service as compose does, within its grace; give its status."""
    process = running.processes[service]
    process.send_signal(signal.Signals[running.services[service]["stop_signal"]])
    return process.wait(float(running.services[service]["stop_grace_period"].rstrip("s")))
