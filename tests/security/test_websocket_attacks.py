"""WebSockets by clients who mean harm: what they write, do not read, or hold, is bounded, answered and logged."""

import asyncio
import base64
import contextlib
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.asyncio.server import ServerConnection, serve
from websockets.frames import Frame, Opcode

from proxy.protocol import Conversation
from tests.support.front import SECRET
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

PATH = "/agent/v1/graph/ws"
HELLO = b'{"text":"hi"}'
KEY = base64.b64encode(b"k" * 16).decode()


class Client:
    """A client who writes frames as he likes; masked with nothing."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def status(self) -> int:
        """Read the head of the answer to the handshake."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        return int(head.split(b" ")[1])

    async def write(self, *frames: bytes) -> None:
        """Write, and wait for room."""
        self.writer.write(b"".join(frames))
        await self.writer.drain()

    async def read(self) -> dict[str, object]:
        """Read one short text."""
        async with asyncio.timeout(10):
            _, length = await self.reader.readexactly(2)
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            value: dict[str, object] = json.loads(await self.reader.readexactly(length))
            return value


def frame(opcode: int, data: bytes = b"", *, fin: bool = True) -> bytes:
    """Write a frame of at most 125 bytes."""
    return bytes([0x80 * fin | opcode, 0x80 | len(data)]) + bytes(4) + data


@asynccontextmanager
async def dialled(proxy: Proxy, token: str, *fields: str, key: str = KEY) -> AsyncIterator[Client]:
    """Send a handshake."""
    host, _, port = proxy.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"GET {PATH} HTTP/1.1", "Host: a", "Connection: Upgrade", "Upgrade: websocket"]
    lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    writer.write("\r\n".join([*lines, *fields, "", ""]).encode("latin-1"))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


@asynccontextmanager
async def proxied(
    directory: Path, said: str = "", **settings: str
) -> AsyncIterator[tuple[Proxy, Principals, list[str]]]:
    """Run a proxy before a sidecar that says `said` without end to every run, or nothing; give what it was asked."""
    asked: list[str] = []

    async def talk(connection: ServerConnection) -> None:
        with contextlib.suppress(Exception):
            async for message in connection:
                asked.append(str(message))
                while said:
                    await connection.send(said)

    principals = Principals()
    async with serve(talk, "127.0.0.1", 0, max_size=None) as server:
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        settings = {"PROXY_RATE_LIMIT": "off", **principals.environment(), **settings}
        proxy = await asyncio.to_thread(start_proxy, directory, url, SECRET, **settings)
        try:
            yield proxy, principals, asked
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)


async def test_a_handshake_that_cannot_be_read_is_answered_and_logged(tmp_path: Path) -> None:
    """Nobody holds a connection by what the server of WebSockets gives up on, with or without a credential."""
    handshakes: dict[str, tuple[list[str], str]] = {
        "too many fields": ([f"x-{number}: 1" for number in range(130)], KEY),
        "too long a field": (["x-long: " + "x" * 9000], KEY),
        "no key": ([], "!" * 24),
        "two keys": ([f"Sec-WebSocket-Key: {KEY}"], KEY),
        "no token in a subprotocol": (["Sec-WebSocket-Protocol: ,(;"], KEY),
    }
    async with proxied(tmp_path) as (proxy, principals, _):
        statuses = {}
        for name, (fields, key) in handshakes.items():
            for token in ("", principals.token("alice")):
                async with dialled(proxy, token, *fields, key=key) as client:
                    statuses[name, bool(token)] = await client.status()
        logged: list[int] = []
        async with asyncio.timeout(10):
            while len(logged) < len(statuses):
                logged = [line["status"] for line in proxy.log_lines() if line["event"] == "request.finished"]
                await asyncio.sleep(0.01)

    assert set(statuses.items()) == {((name, known), 426 if known else 401) for name in handshakes for known in (0, 1)}
    assert sorted(logged) == sorted(statuses.values())


async def test_pings_of_a_client_that_does_not_read_fill_no_memory(tmp_path: Path) -> None:
    """Of 40 MB of pings next to no pong is kept, and who reads again is answered."""
    async with proxied(tmp_path) as (proxy, principals, _), dialled(proxy, principals.token("alice")) as client:
        assert await client.status() == 101
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]  # a client that does not read
        before = memory_of(proxy)
        pings = frame(Opcode.PING, b"p" * 125) * 500
        for _ in range((40 << 20) // len(pings)):
            await client.write(pings)
        grown = memory_of(proxy) - before

    assert grown < 10 << 20


async def test_parts_of_a_message_are_held_as_its_bytes() -> None:
    """However many they are, empty ones too, and whatever comes between."""
    config = Config(app=lambda: None)
    config.load()
    conversation = Conversation(config, ServerState(), {})
    conversation.handle_text(Frame(Opcode.TEXT, b"{", fin=False))
    for _ in range(1000):
        conversation.handle_cont(Frame(Opcode.CONT, b"", fin=False))

    assert (conversation.frames, bytes(conversation._begun)) == ([], b"{")


async def test_a_message_in_parts_arrives_whole(tmp_path: Path) -> None:
    """Text and bytes, in many parts, with pings between them."""
    async with proxied(tmp_path) as (proxy, principals, asked), dialled(proxy, principals.token("alice")) as client:
        assert await client.status() == 101
        for opcode in (Opcode.TEXT, Opcode.BINARY):
            await client.write(frame(opcode, HELLO[:3], fin=False))
            for letter in HELLO[3:]:
                parts = [frame(Opcode.CONT, b"", fin=False)] * 99
                await client.write(*parts, frame(Opcode.PING), frame(Opcode.CONT, bytes([letter]), fin=False))
            await client.write(frame(Opcode.CONT))
        async with asyncio.timeout(10):
            while len(asked) < 2:
                await asyncio.sleep(0.01)

    assert ['"text":"hi"' in each for each in asked] == [True, True]


@pytest.mark.parametrize("setting", ["PROXY_WEBSOCKET_TOTAL_SECONDS", "PROXY_WEBSOCKET_IDLE_SECONDS"])
async def test_a_client_that_does_not_read_holds_no_place_for_ever(tmp_path: Path, setting: str) -> None:
    """When its time is up its goodbye is not waited for, and the next caller gets in."""
    settings = {setting: "1", "PROXY_WEBSOCKETS_AT_ONCE": "1"}
    said = json.dumps({"event": "message", "text": "x" * 65_536})
    async with (
        proxied(tmp_path, said, **settings) as (proxy, principals, _),
        dialled(proxy, principals.token("alice")) as client,
    ):
        assert await client.status() == 101
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]  # as above
        await client.write(frame(Opcode.TEXT, HELLO))
        line = await asyncio.to_thread(proxy.line_of, operation="ws", status=101)
        async with dialled(proxy, principals.token("bob")) as other:
            status = await other.status()

    assert (line["end"], status) == ("total_deadline" if "TOTAL" in setting else "idle_deadline", 101)


async def test_a_client_that_leaves_during_the_handshake_is_one_that_left(tmp_path: Path) -> None:
    """It is no failure of the proxy's, and leaves no line that says so."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def wait(*_: object) -> None:
        asked.set()
        await go_on.wait()

    async def talk(_: ServerConnection) -> None:
        pass

    principals = Principals()
    async with serve(talk, "127.0.0.1", 0, process_request=wait) as server:
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        proxy = await asyncio.to_thread(start_proxy, tmp_path, url, SECRET, **principals.environment())
        try:
            async with dialled(proxy, principals.token("alice")):
                await asyncio.wait_for(asked.wait(), 10)
            async with httpx.AsyncClient(base_url=proxy.url, trust_env=False) as http:
                await http.get("/health/live")  # by now the proxy has heard of the reset
            go_on.set()
            line = await asyncio.to_thread(proxy.line_of, operation="ws")
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)

    assert line["end"] == "client_left"
    assert "request.failed" not in proxy.log.read_text()


async def test_one_caller_does_not_take_every_place(tmp_path: Path) -> None:
    """Whomever he acts for he has his share and is told so; others still get in, and what is closed is his again."""
    async with (
        proxied(tmp_path, PROXY_WEBSOCKETS_PER_CALLER="1") as (proxy, principals, _),
        dialled(proxy, principals.token("alice")) as first,
    ):
        assert await first.status() == 101
        statuses = []
        for subject, fields in (("alice", []), ("alice", ["X-On-Behalf-Of: carol"]), ("bob", [])):
            async with dialled(proxy, principals.token(subject), *fields) as client:
                statuses.append(await client.status())
        first.writer.transport.abort()
        await asyncio.to_thread(proxy.line_of, operation="ws", status=101, principal="alice")
        async with dialled(proxy, principals.token("alice")) as client:
            statuses.append(await client.status())

    assert statuses == [429, 429, 101, 101]


async def test_runs_that_wait_for_one_another_are_bounded(tmp_path: Path) -> None:
    """Sixteen may wait on one connection; the next is refused, and the connection stays open."""
    async with proxied(tmp_path) as (proxy, principals, asked), dialled(proxy, principals.token("alice")) as client:
        assert await client.status() == 101
        await client.write(*[frame(Opcode.TEXT, HELLO)] * 18)
        refusals = [await client.read(), await client.read()]
        async with asyncio.timeout(10):
            while len(asked) < 1:
                await asyncio.sleep(0.01)

    codes = [data["code"] for each in refusals if isinstance(data := each["data"], dict)]
    assert codes == ["reduced_capacity"] * 2


async def test_runs_over_a_websocket_count_as_open(tmp_path: Path) -> None:
    """A proxy that has as many as it takes on refuses one more, on a connection from before too, and until it ended."""
    async with (
        proxied(tmp_path, PROXY_MAX_OPEN_RUNS="1") as (proxy, principals, _),
        httpx.AsyncClient(base_url=proxy.url, trust_env=False) as http,
    ):
        headers = {"Authorization": f"Bearer {principals.token('bob')}"}
        async with dialled(proxy, principals.token("alice")) as client:
            assert await client.status() == 101
            await client.write(*[frame(Opcode.TEXT, HELLO)] * 2)
            refusal = await client.read()
            during = await http.post("/agent/invoke", json={"text": "hi"}, headers=headers)
        await asyncio.to_thread(proxy.line_of, operation="ws")
        after = await http.post("/agent/invoke", json={"text": "hi"}, headers=headers)

    assert isinstance(refusal["data"], dict)
    assert (refusal["data"]["code"], refusal["data"]["retry_after_seconds"]) == ("reduced_capacity", 1)
    assert (during.status_code, during.json()["code"]) == (503, "reduced_capacity")
    assert "reduced_capacity" not in after.text


def memory_of(proxy: Proxy) -> int:
    """Give the bytes that a process holds in memory."""
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
