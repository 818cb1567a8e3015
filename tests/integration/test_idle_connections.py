"""How a proxy that ends parts from those who keep connections to it: no request and no answer is lost on one."""

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from proxy.partings import end_idle
from tests.support.agent import free_port
from tests.support.names import running_names
from tests.support.nginx import Nginx, start_nginx, stop
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

STAYS, LEAVES = "127.0.0.31", "127.0.0.32"
RUN = b"POST /agent/invoke HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}"
MUCH = b"x" * (8 << 20)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.Transport, socket.socket]]:
    """Give the server's side of a connection, as the loop has it, and the client's."""
    accepted: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.set_result(cast("asyncio.Transport", transport))
            cast("asyncio.Transport", transport).pause_reading()

    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()) as client:
        client.setblocking(False)
        async with asyncio.timeout(10), server:
            transport = await accepted
            yield transport, client
            if not transport.is_closing():
                transport.abort()


async def rest_of(client: socket.socket) -> bytes:
    """Read until the end."""
    rest = bytearray()
    while part := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
        rest += part
    return bytes(rest)


async def test_who_has_every_answer_is_told_at_once() -> None:
    """In the same turn of the loop there is an error that shows before anything is sent; what came before is kept."""
    async with connected() as (transport, client):
        transport.write(b"answer")
        assert await asyncio.get_running_loop().sock_recv(client, 3) == b"ans"

        end_idle(transport)

        assert client.recv(100) == b"wer"
        with pytest.raises(ConnectionResetError):
            client.recv(100)


async def test_who_still_takes_an_answer_gets_all_of_it() -> None:
    """The end is an ordinary one then."""
    async with connected() as (transport, client):
        transport.write(MUCH)

        end_idle(transport)

        assert await rest_of(client) == MUCH


async def test_who_is_parted_from_already_is_not_reset() -> None:
    """An end that is under way stays the ordinary one that it is."""
    async with connected() as (transport, client):
        transport.write(b"answer")
        transport.close()

        end_idle(transport)

        assert await rest_of(client) == b"answer"


async def test_who_has_just_asked_is_not_parted_from() -> None:
    """The request is in the system's buffer only: the loop has not come to read it."""
    async with connected() as (transport, client):
        client.send(RUN)

        end_idle(transport)

        assert not transport.is_closing()


class Edge:
    """nginx as deployed before two proxies, and one client's connection to it."""

    def __init__(self, nginx: Nginx, proxies: dict[str, Proxy]) -> None:
        self.nginx = nginx
        self.proxies = proxies
        self._wire = socket.create_connection((nginx.host, nginx.port), timeout=20)
        self._sent = 0

    def send(self) -> None:
        """Ask for a run, which both proxies refuse: there is no credential."""
        self._sent += 1
        self._wire.sendall(RUN)

    def status(self) -> int:
        """Read an answer."""
        answer = b""
        while not (head := re.search(rb"(?is)^HTTP/1.1 (\d+).*\r\ncontent-length: (\d+).*?\r\n\r\n", answer)):
            answer += self._receive()
        while len(answer) < head.end() + int(head[2]):
            answer += self._receive()
        return int(head[1])

    def asked(self) -> list[str]:
        """Wait for the line of the request that was sent last, and name the proxies that nginx turned to."""
        while len(lines := self.nginx.access_lines()) < self._sent:
            time.sleep(0.01)
        return re.findall(r"[\d.]+(?=:)", str(lines[-1]["upstream"]))

    def tell_workers(self, number: int) -> None:
        """Send each of nginx's workers this signal."""
        children = Path(f"/proc/{self.nginx.process.pid}/task/{self.nginx.process.pid}/children").read_text()
        for worker in map(int, children.split()):
            os.kill(worker, number)

    def close(self) -> None:
        """Leave."""
        self._wire.close()

    def _receive(self) -> bytes:
        part = self._wire.recv(65_536)
        assert part
        return part


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    """Run it, and wait until the client's worker keeps a connection to each proxy, and would ask the leaving one."""
    port, principals = free_port(), Principals()
    (tmp_path / "edge").mkdir()
    settings: dict[str, Any] = {"PROXY_PORT": str(port), **principals.environment()}
    proxies: dict[str, Proxy] = {}
    with running_names() as names:
        try:
            for address in (STAYS, LEAVES):
                proxies[address] = start_proxy(tmp_path, "http://127.0.0.1:9", "s" * 48, PROXY_HOST=address, **settings)
            names.addresses["proxy"] = tuple(proxies)
            nginx = start_nginx(tmp_path / "edge", f"http://proxy:{port}", resolver=names.address)
            edge = Edge(nginx, proxies)
            try:
                turns: list[list[str]] = []
                deadline = time.monotonic() + 30
                while turns[-3:] != [[STAYS], [LEAVES], [STAYS]]:
                    assert time.monotonic() < deadline, turns
                    edge.send()
                    edge.status()
                    turns.append(edge.asked())
                yield edge
            finally:
                edge.close()
                stop(nginx)
        finally:
            for proxy in proxies.values():
                stop_proxy(proxy.process)


def test_a_run_that_meets_a_parting_proxy_goes_to_the_other(edge: Edge) -> None:
    """It has the run at hand before it hears that the connection it would take has ended: nothing is lost."""
    leaving = edge.proxies[LEAVES].process
    edge.tell_workers(signal.SIGSTOP)
    edge.send()
    leaving.terminate()
    status = leaving.wait(30)
    edge.tell_workers(signal.SIGCONT)

    assert (status, edge.status()) == (0, 401)
    assert edge.asked() == [LEAVES, STAYS]
