"""The tiny service that Traefik and Caddy ask before they forward: verifies the token, counts the caller.

As cheap as Python makes it: a bare protocol, no framework. Run with the port as its argument.
"""

import asyncio
import os
import sys
import time
from typing import cast

import jwt
import uvloop

from benchmarks.contenders.model import NEVER
from benchmarks.tokens import AUDIENCE, ISSUER, SECRET

YES = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-caller: %s\r\n\r\n"
NO = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n"
MANY = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"
LIMIT = int(os.environ.get("BENCH_LIMIT", NEVER))


class Answerer(asyncio.Protocol):
    """One connection from the proxy; every request is one head without a body."""

    counts: dict[tuple[str, int], int] = {}  # noqa: RUF012  shared on purpose: one count for all connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        """Answer every whole head."""
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
            self.transport.write(self._decide(head))

    def _decide(self, head: bytes) -> bytes:
        at = head.lower().find(b"\r\nauthorization: bearer ")
        token = head[at + 24 :].partition(b"\r\n")[0] if at >= 0 else b""
        try:
            claims = jwt.decode(token, SECRET, ["HS256"], {"require": ["exp", "sub"]}, issuer=ISSUER, audience=AUDIENCE)
        except jwt.InvalidTokenError:
            return NO
        key = (str(claims["sub"]), int(time.time()) // 60)
        self.counts[key] = count = self.counts.get(key, 0) + 1
        return YES % key[0].encode() if count <= LIMIT else MANY


async def serve(port: int) -> None:
    """Listen on 127.0.0.1 until the process is stopped."""
    server = await asyncio.get_running_loop().create_server(Answerer, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
