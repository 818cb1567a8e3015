"""Runs an installation of every tier on one machine: edge nginx, proxies, inner nginx, agents, Postgres and Redis.

Each tier's members listen on one port of several loopback addresses, and a name server knows which: as containers do.
"""

import asyncio
import contextlib
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.support.agent import PRODUCTION as GENTLE
from tests.support.agent import Agent, free_port, start_agent
from tests.support.agent import stop as stop_agent
from tests.support.checkpoints import storage
from tests.support.names import Names, running_names
from tests.support.nginx import BALANCER, Nginx, start_nginx
from tests.support.nginx import stop as stop_nginx
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

AGENTS = [f"127.0.0.{number}" for number in range(2, 9)]
PROXIES = [f"127.0.0.{number}" for number in range(9, 16)]
GRACE = 60.0
TOLD = 1000
PRODUCTION = {
    "MODE": "production",
    "CORS_ALLOW_CREDENTIALS": "false",
    "IS_DEBUG": "false",
    "JWT_ISSUER": "agentflow-proxy",
    "JWT_AUDIENCE": "agentflow",
}
"""What docker-compose.yml sets too."""


@dataclass(slots=True)
class Installation:
    """Every part, running; `agents` and `proxies` by address."""

    directory: Path
    names: Names
    secret: str
    storage: dict[str, str]
    principals: Principals
    settings: dict[str, str]
    agent_port: int = field(default_factory=free_port)
    proxy_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    agents: dict[str, Agent] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    balancer: Nginx | None = None
    edge: Nginx | None = None

    @property
    def url(self) -> str:
        """Give where clients call."""
        assert self.edge is not None
        return self.edge.url

    @property
    def metrics(self) -> list[str]:
        """Give where each proxy serves its metrics, also the one that takes its place."""
        return [f"{address}:{self.metrics_port}" for address in self.proxies]

    def client(self, subject: str = "alice") -> httpx.Client:
        """Make a caller at the edge."""
        fields = {"Authorization": f"Bearer {self.principals.token(subject)}"}
        return httpx.Client(base_url=self.url, headers=fields, timeout=30, trust_env=False)

    def add_agent(self) -> Agent:
        """Start one more agent, and let the name server tell of it."""
        return self.start_agent(next(address for address in AGENTS if address not in self.agents))

    def start_agent(self, address: str) -> Agent:
        """Start an agent at this address, and let the name server tell of it."""
        at, shared = (address, self.agent_port), {"JWT_SECRET_KEY": self.secret, **PRODUCTION, **self.storage}
        self.agents[address] = start_agent(self.directory, at=at, launcher=GENTLE, **shared)
        self.names.addresses["agent"] = tuple(self.agents)
        return self.agents[address]

    def stop_agent(self, address: str) -> int:
        """Ask an agent to end, as compose does, and wait for what it still does; give its status."""
        return _ended(self.agents.pop(address).process)

    def remove_agent(self, address: str) -> int:
        """Stop an agent for good; the name server tells of it until it has ended, as Docker's does."""
        status = self.stop_agent(address)
        self.names.addresses["agent"] = tuple(self.agents)
        return status

    def add_proxy(self) -> Proxy:
        """Start one more proxy, and let the name server tell of it."""
        return self.start_proxy(next(address for address in PROXIES if address not in self.proxies))

    def start_proxy(self, address: str, **more: str) -> Proxy:
        """Start a proxy at this address, and let the name server tell of it."""
        assert self.balancer is not None
        listens = {"PROXY_HOST": address, "PROXY_PORT": str(self.proxy_port), "PROXY_TRUSTED_HOPS": "1"}
        listens |= {"PROXY_METRICS_HOST": address, "PROXY_METRICS_PORT": str(self.metrics_port)}
        settings = listens | {"PROXY_AGENT_AUDIENCE": "agentflow"} | self.settings | more
        self.proxies[address] = start_proxy(
            self.directory, self.balancer.url, self.secret, **self.principals.environment(), **settings
        )
        self.names.addresses["proxy"] = tuple(self.proxies)
        return self.proxies[address]

    def stop_proxy(self, address: str) -> int:
        """Ask a proxy to end, as compose does, and wait for what it still does; give its status."""
        return _ended(self.proxies.pop(address).process)

    def remove_proxy(self, address: str) -> int:
        """Stop a proxy for good, likewise."""
        status = self.stop_proxy(address)
        self.names.addresses["proxy"] = tuple(self.proxies)
        return status

    def reload(self, nginx: Nginx) -> None:
        """Have nginx read its configuration again, in new workers; the old ones end what they do."""
        nginx.process.send_signal(signal.SIGHUP)

    def runs(self) -> dict[str, int]:
        """Count the runs that each living agent has answered, by the lines of its own log."""
        return {
            address: sum("POST /v1/graph/" in line for line in agent.log.read_text(errors="replace").splitlines())
            for address, agent in self.agents.items()
        }

    def last_words(self) -> list[tuple[str, str]]:
        """Give the end of every log, also of those that have ended."""
        logs = [*self.directory.glob("*.log"), *self.directory.glob("*/std???")]
        return [(str(log.relative_to(self.directory)), log.read_text(errors="replace")[-TOLD:]) for log in sorted(logs)]

    async def replace_agent(self, address: str) -> int:
        """Restart an agent and wait until it has work again; give the status with which the old one ended."""
        status = await asyncio.to_thread(self.stop_agent, address)
        await asyncio.to_thread(self.start_agent, address)
        while not self.runs()[address]:
            await asyncio.sleep(0.05)
        return status

    async def replace_proxy(self, address: str) -> int:
        """Restart a proxy and wait until it has work again; give the status with which the old one ended."""
        status = await asyncio.to_thread(self.stop_proxy, address)
        proxy = await asyncio.to_thread(self.start_proxy, address)
        while not proxy.has_answered():
            await asyncio.sleep(0.05)
        return status

    def start(self, *, agents: int, proxies: int) -> None:
        """Start every tier, from the inside out."""
        for _ in range(agents):
            self.add_agent()
        self.balancer = self._start_nginx("balancer", f"http://agent:{self.agent_port}", deployed=BALANCER)
        for _ in range(proxies):
            self.add_proxy()
        self.edge = self._start_nginx("edge", f"http://proxy:{self.proxy_port}")
        self.await_ready()

    def await_work(self) -> None:
        """Call until every agent has had a run since: the balancer passes over one that was away for two seconds."""
        before, deadline = self.runs(), time.monotonic() + GRACE
        with self.client("nobody-special") as client:
            while any(runs == before[address] for address, runs in self.runs().items()):
                assert time.monotonic() < deadline, (before, self.runs())
                client.post("/agent/invoke", json={"text": "hi"}).raise_for_status()

    def await_ready(self) -> None:
        """Wait until both balancers have learnt where to go."""
        with self.client("nobody-special") as client:
            deadline = GRACE
            while not client.get("/agent/ping").is_success:
                deadline -= 1
                assert deadline > 0, "not ready"

    def _start_nginx(self, name: str, upstream: str, **more: Path) -> Nginx:
        directory = self.directory / name
        directory.mkdir()
        return start_nginx(directory, upstream, resolver=self.names.address, **more)

    def stop(self) -> None:
        """Stop whatever runs, from the outside in."""
        for nginx in (self.edge, self.balancer):
            if nginx is not None:
                stop_nginx(nginx)
        for proxy in self.proxies.values():
            stop_proxy(proxy.process)
        for agent in self.agents.values():
            agent.process.kill()
            stop_agent(agent.process)


@contextlib.contextmanager
def installed(directory: Path, *, agents: int, proxies: int, **settings: str) -> Iterator[Installation]:
    """Run an installation as long as the context lasts; `settings` are the proxies'."""
    with ExitStack() as stack:
        kept = stack.enter_context(storage("postgres"))
        names = stack.enter_context(running_names())
        secret = secrets.token_urlsafe(48)
        composed = {"PROXY_RATE_LIMIT": "off", "PROXY_POOL_IDLE_CONNECTIONS": "0"}
        installation = Installation(directory, names, secret, kept, Principals(), composed | settings)
        stack.callback(installation.stop)
        installation.start(agents=agents, proxies=proxies)
        yield installation


def _ended(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(GRACE)
