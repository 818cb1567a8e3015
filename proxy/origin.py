"""Where the sidecar listens, at a TCP port or on a Unix socket of this host, and how to connect to it.

Speaks no HTTP, and keeps no connection.
"""

import asyncio
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final, Self
from urllib.parse import unquote, urlsplit

LOCAL_AUTHORITY: Final = "localhost"
"""What `Host` says on a Unix socket, which has no name; the sidecar's ALLOWED_HOST must have it."""
MOST_PATH_BYTES: Final = 107
"""Linux has room for so many in a socket's address (sockaddr_un, unix(7))."""
RETRY_SECONDS: Final = 0.01
_TCP: Final = re.compile(r"http://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}/?", re.ASCII)
_UNIX: Final = "http+unix://"
_PATH: Final = re.compile(r"/[^?#%\s]*[^?#%\s/]")
_FORMS: Final = "must be http://host:port, without a path"


@dataclass(frozen=True, slots=True)
class Origin:
    """A host and a port, or else the path of a socket; `authority` is what `Host` says (RFC 9110 §7.2)."""

    authority: str
    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def of(cls, url: str) -> Self:
        """Read `http://host:port` or `http+unix:///path`. Raises ValueError, which says what would be right."""
        if "unix" in url.partition(":")[0]:
            return cls(LOCAL_AUTHORITY, path=_socket_path(url))
        if _TCP.fullmatch(url) is None or not _is_reachable(url):
            raise ValueError(_FORMS)
        parts = urlsplit(url)
        return cls(parts.netloc, parts.hostname or "", parts.port or 0)

    async def connect[Made: asyncio.BaseProtocol](
        self, protocol: Callable[[], Made]
    ) -> tuple[asyncio.BaseTransport, Made]:
        """Make one connection. Raises OSError; how long to wait is the caller's business."""
        loop = asyncio.get_running_loop()
        if not self.path:
            return await loop.create_connection(protocol, self.host, self.port)
        connection = await _reach(self.path)
        try:
            return await loop.create_unix_connection(protocol, sock=connection)
        except BaseException:
            connection.close()
            raise


async def _reach(path: str) -> socket.socket:
    """Connect to the socket at `path`. While its queue is full, ask again.

    TCP waits by itself then. Here the system says EAGAIN at once (connect(2)), which asyncio takes for a connection
    that is being made, and uvloop for an error.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                connection.connect(path)
            except BlockingIOError:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return connection
    except BaseException:
        connection.close()
        raise


def _is_reachable(url: str) -> bool:
    """Say whether a URL has a port that exists and, where its host is in brackets, an IPv6 address there."""
    try:
        parts = urlsplit(url)
        return bool(parts.port) and (":" not in (parts.hostname or "") or bool(IPv6Address(parts.hostname or "")))
    except ValueError:
        return False


def _socket_path(url: str) -> str:
    """Give the path in `url`. Raises ValueError; other spellings are told what they would be here."""
    path = url.removeprefix(_UNIX)
    if path != url and _is_path(path):
        if len(os.fsencode(path)) > MOST_PATH_BYTES:
            raise ValueError(f"the path of a socket has at most {MOST_PATH_BYTES} bytes")
        return path
    meant = "/" + unquote(url.partition(":")[2]).strip("/")
    raise ValueError(f"must be {_UNIX}{meant if _is_path(meant) else '/path/of/the/socket'}, the path as it is")


def _is_path(text: str) -> bool:
    return _PATH.fullmatch(text) is not None and text.isprintable()
