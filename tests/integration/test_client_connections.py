"""What a client can do to its own connection, and cannot do to anybody else: raw sockets to a running proxy."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.protocol import OneAtATime
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import CHUNKED_HEAD, Line, chunk, raw_upstream

SECRET = "s" * 48
LIVE = b"GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n"


def run(token: str, *fields: str, body: bytes = b'{"text":"hi"}') -> bytes:
    """Write a stream request."""
    lines = ["POST /agent/stream HTTP/1.1", "host: a", f"authorization: Bearer {token}", *fields]
    lines += ["content-type: application/json", f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """Read until the proxy closes or resets the connection."""
    rest = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(65_536):
            rest += part
    return rest


class House:
    """A running proxy before an upstream that never ends its answer: a part of one, or a flood when asked for that."""

    def __init__(self, proxy: Proxy, token: str, gone: asyncio.Event, held_back: asyncio.Event) -> None:
        self.proxy = proxy
        self.token = token
        self.gone = gone
        self.held_back = held_back

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection to the proxy."""
        host, _, port = self.proxy.url.removeprefix("http://").partition(":")
        return await asyncio.open_connection(host, int(port))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """Run it."""
    gone, held_back = asyncio.Event(), asyncio.Event()

    async def talk(line: Line) -> None:
        flood = b"flood" in await line.request()
        await line.write(CHUNKED_HEAD + chunk(b"part"))
        with contextlib.suppress(ConnectionError):
            while flood:
                try:
                    await asyncio.wait_for(line.write(chunk(b"x" * 65_536)), 0.3)
                except TimeoutError:
                    held_back.set()
                    break
        await line.gone()
        gone.set()

    principals = Principals()
    async with raw_upstream(talk) as upstream:
        proxy = await asyncio.to_thread(start_proxy, tmp_path, upstream.url, SECRET, **principals.environment())
        try:
            yield House(proxy, principals.token("alice"), gone, held_back)
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)


async def test_a_request_behind_a_running_one_ends_both(house: House) -> None:
    """Pipelining is refused: the connection is closed, and so is the run's, rather than left to go on unheard."""
    reader, writer = await house.connect()
    writer.write(run(house.token))
    async with asyncio.timeout(10):
        await reader.readuntil(b"part")
        writer.write(LIVE)
        rest = await rest_of(reader)
        await house.gone.wait()

    assert b"live" not in rest
    assert b"0\r\n\r\n" not in rest
    writer.close()


async def test_pipelined_requests_are_not_gathered(house: House) -> None:
    """Of many requests sent at once at most the first is answered, and the connection ends."""
    reader, writer = await house.connect()
    writer.write(LIVE * 1000)
    async with asyncio.timeout(10):
        answers = await rest_of(reader)

    assert answers.count(b'{"status":"live"}') <= 1
    writer.close()


async def test_a_connection_serves_one_request_after_the_other(house: House) -> None:
    """Keep-alive is not pipelining."""
    reader, writer = await house.connect()
    async with asyncio.timeout(10):
        for _ in range(3):
            writer.write(LIVE)
            answer = await reader.readuntil(b"}")
            assert answer.startswith(b"HTTP/1.1 200")
    writer.close()


async def test_the_body_of_an_upgrade_is_no_request(house: House) -> None:
    """A request that offers an upgrade is refused, and what follows it is not read as the next request."""
    reader, writer = await house.connect()
    hidden = b"GET /health/live HTTP/1.1\r\nhost: a\r\nx-request-id: smuggled\r\n\r\n"
    offered = run(house.token, "connection: upgrade", "upgrade: h2c", body=hidden)
    writer.write(offered.removesuffix(hidden))
    await writer.drain()
    writer.write(hidden)
    async with asyncio.timeout(10):
        answers = await rest_of(reader)

    assert answers.startswith(b"HTTP/1.1 400")
    assert answers.count(b"HTTP/1.1") == 1
    assert b"smuggled" not in answers
    writer.close()


async def test_a_trailer_is_no_header_field(house: House) -> None:
    """What comes behind a body is no credential, address or id: whoever stands before us never looked at it."""
    reader, writer = await house.connect()
    lines = ["POST /agent/stream HTTP/1.1", "host: a", "content-type: application/json", "transfer-encoding: chunked"]
    trailers = f"0\r\nauthorization: Bearer {house.token}\r\nx-request-id: trailing\r\n\r\n"
    writer.write("\r\n".join([*lines, "", ""]).encode() + chunk(b'{"text":"hi"}') + trailers.encode())
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 401")
    assert b"trailing" not in head
    writer.close()


async def test_half_a_connection_is_none(house: House) -> None:
    """A client that closes its half is taken for gone: the answer is cut, and so is the run."""
    reader, writer = await house.connect()
    writer.write(run(house.token))
    async with asyncio.timeout(10):
        await reader.readuntil(b"part")
        writer.write_eof()
        rest = await rest_of(reader)
        await house.gone.wait()

    assert b"0\r\n\r\n" not in rest
    writer.close()


async def test_half_a_connection_that_is_not_read_is_none_either(house: House) -> None:
    """Its run ends at once, whenever the client may come to take what was written."""
    reader, writer = await house.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of asyncio's streams can do that
    writer.write(run(house.token, body=b'{"text":"flood"}'))
    async with asyncio.timeout(20):
        await house.held_back.wait()
        writer.write_eof()
        await house.gone.wait()

    assert not reader.at_eof()
    writer.close()


async def test_a_client_that_leaves_after_a_long_body_is_noticed(house: House) -> None:
    """A body beyond what is buffered pauses the connection; its end is heard all the same."""
    reader, writer = await house.connect()
    writer.write(run(house.token, body=b'{"text":"%b"}' % (b"x" * 500_000)))
    async with asyncio.timeout(10):
        await reader.readuntil(b"part")
        writer.close()
        await house.gone.wait()


async def test_a_connection_that_is_closed_is_not_held_by_a_client_that_does_not_read() -> None:
    """What was written and not taken keeps a closed transport open; the second look at it gives it up."""
    import uvloop  # noqa: PLC0415  only here: it is this loop's transport that lingers

    async def closes() -> tuple[bool, bool]:
        gone = asyncio.Event()
        accepted: asyncio.Future[OneAtATime] = asyncio.get_running_loop().create_future()

        class Watched(OneAtATime):
            def __init__(self) -> None:
                pass

            def connection_made(self, transport: Any) -> None:
                self.transport = transport
                accepted.set_result(self)

            def connection_lost(self, exc: Exception | None) -> None:
                gone.set()

        server = await asyncio.get_running_loop().create_server(Watched, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()):
            connection = await accepted
            connection.transport.write(b"x" * (8 << 20))
            connection.transport.close()
            connection.give_up_closing()
            await asyncio.sleep(0.05)
            after_one = gone.is_set()
            connection.give_up_closing()
            async with asyncio.timeout(5):
                await gone.wait()
        server.close()
        return after_one, gone.is_set()

    assert await asyncio.to_thread(uvloop.run, closes()) == (False, True)


async def test_a_long_path_is_told_in_part(house: House) -> None:
    """Tens of thousands of characters come back neither in the problem nor in the log."""
    reader, writer = await house.connect()
    path = b"/agent/" + b"x" * 50_000
    writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\nx-request-id: long\r\nconnection: close\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await rest_of(reader)
    line = await asyncio.to_thread(house.proxy.line_of, request_id="long")

    assert answer.startswith(b"HTTP/1.1 401")
    assert len(answer) < 2048
    assert len(line["path"]) == 1025
    writer.close()


@pytest.mark.parametrize(
    ("request_line", "hosts", "status"),
    [
        (b"GET /health/live HTTP/1.1", [], b"400"),
        (b"GET /health/live HTTP/1.1", [b"a", b"b"], b"400"),
        (b"GET /health/live HTTP/1.1", [b"a", b"a"], b"400"),
        (b"GET /health/live HTTP/1.0", [b"a", b"b"], b"400"),
        (b"GET /health/live HTTP/0.9", [], b"400"),
        (b"GET /health/live HTTP/2.0", [], b"400"),
        (b"GET /health/live HTTP/1.0", [], b"200"),
        (b"GET /health/live HTTP/1.1", [b""], b"200"),
    ],
)
async def test_a_request_has_one_host(house: House, request_line: bytes, hosts: list[bytes], status: bytes) -> None:
    """RFC 9112 §3.2: those before us may each have taken another one for it."""
    reader, writer = await house.connect()
    fields = b"".join(b"host: %b\r\n" % host for host in hosts)
    writer.write(request_line + b"\r\n" + fields + b"connection: close\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await rest_of(reader)

    assert answer.startswith(b"HTTP/1.1 " + status)
    writer.close()


async def test_what_is_no_request_has_its_line(house: House) -> None:
    """Bytes that are no HTTP are answered by the server itself, and written down like every request."""
    reader, writer = await house.connect()
    writer.write(b"\x16\x03\x01\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await rest_of(reader)
    line = await asyncio.to_thread(house.proxy.line_of, status=400)

    assert answer.startswith(b"HTTP/1.1 400")
    assert (line["method"], line["path"], line["code"], line["fault"]) == (None, None, "invalid_request", "client")
    assert line["client"] == "127.0.0.1"
    writer.close()
