"""`python -m agent_service.serve`: the server of `agentflow api`, for one agent of several, which come and go.

Asked to end, it loses no request that had already reached it: `agentflow api`, meant for development, resets those.
It changes nothing about what is served.
"""

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import override

import uvicorn

from agent_service.listeners import UnixListener, address_of, bind_at, listen_on

APP = "agentflow_cli.src.app.main:app"
SETTLE_SECONDS = 0.25, 2.0
"""For requests that were on their way when the port closed to arrive: at least, and at most for one that does not."""


class Server(uvicorn.Server):
    """uvicorn's server, on a listening socket of ours, which it leaves without a gap."""

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            print(f"running on {address_of(listener)}", flush=True)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            if isinstance(listener, UnixListener):
                listener.unlink()
        accepted = [self._serve_accepted(each) for listener in sockets or () for each in _waiting(listener)]
        for server in self.servers:
            server.close()
        await asyncio.gather(*accepted)
        await self._settle()
        await super().shutdown(sockets)

    async def _settle(self) -> None:
        least, most = SETTLE_SECONDS
        loop = asyncio.get_running_loop()
        until = loop.time() + most
        await asyncio.sleep(0 if self.force_exit else least)
        while self._is_expecting() and not self.force_exit and loop.time() < until:  # noqa: ASYNC110  it is uvicorn's
            await asyncio.sleep(0.02)

    def _is_expecting(self) -> bool:
        """Say whether a connection has not yet had its first request."""
        return any(getattr(connection, "cycle", connection) is None for connection in self.server_state.connections)

    async def _serve_accepted(self, connection: socket.socket) -> None:
        def protocol() -> asyncio.Protocol:
            kind = self.config.http_protocol_class
            return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]

        connection.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)


def _waiting(listener: socket.socket) -> list[socket.socket]:
    """Take the connections that the system has accepted and nobody has taken yet; it would reset them."""
    taken = []
    listener.setblocking(False)
    with suppress(OSError):  # nobody waits any more
        while True:
            taken.append(listener.accept()[0])
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the graph that the file of `--config` names, until SIGTERM; then end what runs, for `--grace` seconds."""
    parser = argparse.ArgumentParser(prog="python -m agent_service.serve")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--uds", type=Path, metavar="PATH", help="a Unix socket instead, for this user and group alone")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("agentflow.json"))
    parser.add_argument("--grace", type=int, default=30, metavar="SECONDS")
    options = parser.parse_args(arguments)
    # As `agentflow api` does: the server reads the one, and imports the graph beside it.
    os.environ["GRAPH_PATH"] = str(options.config.resolve())
    sys.path.insert(0, str(options.config.resolve().parent))
    with listen_on(options.uds) if options.uds else bind_at(options.host, options.port) as listener:
        Server(uvicorn.Config(APP, timeout_graceful_shutdown=options.grace)).run(sockets=[listener])


if __name__ == "__main__":
    main()
