"""Uploads and files through running processes: bytes go on as they come, and a file stays its owner's."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.agent import Agent, ask, start_agent, stop
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import Line, answer, raw_upstream

SECRET = "s" * 48
FILES = "/agent/v1/files"
UPLOADED = answer(b'{"data":{"file_id":"f1","url":"/v1/files/f1"}}', "content-type: application/json")
FORM = "content-type: multipart/form-data; boundary=b"
PART = b"x" * 65_536


@asynccontextmanager
async def proxied(directory: Path, url: str, **settings: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Run a proxy before the upstream at `url`; give it and a token of Alice's."""
    principals = Principals()
    proxy = await asyncio.to_thread(start_proxy, directory, url, SECRET, **principals.environment(), **settings)
    try:
        yield proxy, principals.token("alice")
    finally:
        await asyncio.to_thread(stop_proxy, proxy.process)


class Sender:
    """A client that writes an upload piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def write(self, data: bytes) -> None:
        """Write, and wait for room."""
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        """Write one chunk."""
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def answer(self) -> tuple[int, bytes]:
        """Read the answer: its status and its body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(head.split(b" ")[1]), await self.reader.readexactly(length)


@asynccontextmanager
async def sending(proxy: Proxy, token: str, framing: str) -> AsyncIterator[Sender]:
    """Begin an upload."""
    parts = urlsplit(proxy.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    sender = Sender(reader, writer)
    lines = [f"POST {FILES}/upload HTTP/1.1", "host: a", f"authorization: Bearer {token}", FORM, framing, "", ""]
    await sender.write("\r\n".join(lines).encode())
    try:
        yield sender
    finally:
        writer.transport.abort()


def line_of(proxy: Proxy, code: str) -> dict[str, object]:
    """Wait for the access line of an upload that ended with this problem."""
    return proxy.line_of(operation="files.upload", code=code)


@pytest.mark.parametrize("framing", ["content-length: 131072", "transfer-encoding: chunked"])
async def test_each_part_goes_on_before_the_next_comes(tmp_path: Path, framing: str) -> None:
    """With its length or in chunks: upstream has the first part while the client still holds the second back."""
    seen = asyncio.Event()
    heads: list[bytes] = []

    async def talk(line: Line) -> None:
        heads.append(await line.reader.readuntil(b"\r\n\r\n"))
        received = b""
        while received.count(b"x") < 131_072 or (b"chunked" in heads[0] and not received.endswith(b"0\r\n\r\n")):
            received += await line.reader.read(65_536)
            if received.count(b"x") >= 65_536:
                seen.set()
        await line.write(UPLOADED)

    async with (
        raw_upstream(talk) as upstream,
        proxied(tmp_path, upstream.url) as (proxy, token),
        sending(proxy, token, framing) as sender,
    ):
        write = sender.chunk if "chunked" in framing else sender.write
        await write(PART)
        await asyncio.wait_for(seen.wait(), 10)
        await write(PART)
        if "chunked" in framing:
            await sender.write(b"0\r\n\r\n")
        status, body = await sender.answer()

    handle = json.loads(body)["data"]["file_id"]
    assert (status, handle.partition("~")[2], json.loads(body)["data"]["url"]) == (200, "f1", f"/v1/files/{handle}")
    assert FORM.encode() in heads[0].lower()
    assert framing.encode() in heads[0].lower()


async def test_a_sidecar_that_does_not_read_holds_the_client_back(tmp_path: Path) -> None:
    """Of 64 MB a few megabytes are on the way, in sockets, and the proxy's own part of it is small."""
    begun = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.reader.readuntil(b"\r\n\r\n")
        begun.set()
        line.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport reads
        await asyncio.sleep(60)

    settings = {"PROXY_MAX_UPLOAD_BYTES": str(80 << 20), "PROXY_UPLOAD_TIMEOUT_SECONDS": "3"}
    async with raw_upstream(talk) as upstream, proxied(tmp_path, upstream.url, **settings) as (proxy, token):
        before = memory_of(proxy)
        async with sending(proxy, token, f"content-length: {64 << 20}") as sender:
            await asyncio.wait_for(begun.wait(), 10)
            sent = asyncio.create_task(send_all(sender, 1024))
            status, body = await sender.answer()
            grown = memory_of(proxy) - before
            sent.cancel()

    assert (status, json.loads(body)["code"]) == (504, "upstream_deadline")
    assert grown < 16 << 20


async def send_all(sender: Sender, parts: int) -> None:
    """Write so many parts, as there is room."""
    with contextlib.suppress(ConnectionError):
        for _ in range(parts):
            await sender.write(PART)


def memory_of(proxy: Proxy) -> int:
    """Give the bytes that a process holds in memory."""
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


async def test_an_early_answer_is_passed_on_at_once(tmp_path: Path) -> None:
    """A sidecar that refuses after the head is heard, though the client has not sent the rest."""
    refusal = answer(b'{"error":{"code":"x"}}', "content-type: application/json", status="413 Too Large")

    async def talk(line: Line) -> None:
        await line.reader.readuntil(b"\r\n\r\n")
        await line.write(refusal)

    async with (
        raw_upstream(talk) as upstream,
        proxied(tmp_path, upstream.url) as (proxy, token),
        sending(proxy, token, "content-length: 131072") as sender,
    ):
        await sender.write(PART)
        status, body = await sender.answer()

    assert (status, body) == (413, b'{"error":{"code":"x"}}')


@pytest.mark.parametrize(
    ("framing", "size"), [("content-length: 70000", 0), ("transfer-encoding: chunked", 70_000)], ids=["told", "found"]
)
async def test_too_large_is_refused(tmp_path: Path, framing: str, size: int) -> None:
    """By its announced length nothing is sent upstream; found out on the way, upstream is cut off."""
    lost = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.gone()
        lost.set()

    async with (
        raw_upstream(talk) as upstream,
        proxied(tmp_path, upstream.url, PROXY_MAX_UPLOAD_BYTES="65536") as (proxy, token),
    ):
        async with sending(proxy, token, framing) as sender:
            if size:
                await sender.chunk(b"x" * size)
            status, body = await sender.answer()
        if size:
            await asyncio.wait_for(lost.wait(), 10)

    assert (status, json.loads(body)["code"]) == (413, "body_too_large")
    assert upstream.accepted == (1 if size else 0)


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_client_that_stops_midway_leaves_nothing_behind(tmp_path: Path, leaves: bool) -> None:
    """Whether it hangs up or only falls silent: upstream is cut, and the line says which it was."""
    cut = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.gone()
        cut.set()

    settings = {"PROXY_UPLOAD_TIMEOUT_SECONDS": "60" if leaves else "1"}
    async with raw_upstream(talk) as upstream, proxied(tmp_path, upstream.url, **settings) as (proxy, token):
        async with sending(proxy, token, "content-length: 131072") as sender:
            await sender.write(PART)
            if leaves:
                sender.writer.close()
            else:
                status, body = await sender.answer()
                assert (status, json.loads(body)["code"]) == (408, "body_timeout")
            await asyncio.wait_for(cut.wait(), 10)
        line = await asyncio.to_thread(line_of, proxy, "client_left" if leaves else "body_timeout")

    assert line["status"] == (499 if leaves else 408)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (b"", "upstream_cut"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", "upstream_cut"),
        (b"garbage\r\n\r\n", "upstream_malformed"),
        (answer(b"{}"), "upstream_malformed"),
        (answer(b"{}", status="401 Unauthorized"), "upstream_distrust"),
        (answer(b'{"data":{"file_id":"../x"}}'), "upstream_malformed"),
    ],
)
async def test_what_goes_wrong_upstream_is_told_as_what_it_is(tmp_path: Path, reply: bytes, code: str) -> None:
    """A cut, garbage, an answer about no file, distrust: 502, and never a raw id."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(reply)

    async with (
        raw_upstream(talk) as upstream,
        proxied(tmp_path, upstream.url) as (proxy, token),
        sending(proxy, token, "content-length: 5") as sender,
    ):
        await sender.write(b"hello")
        status, body = await sender.answer()

    assert (status, json.loads(body)["code"]) == (502, code)


async def test_only_so_many_uploads_run_at_once(tmp_path: Path) -> None:
    """One more is told so at once, and there is room again when one has ended."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(UPLOADED)

    async with (
        raw_upstream(talk) as upstream,
        proxied(tmp_path, upstream.url, PROXY_UPLOADS_AT_ONCE="1") as (proxy, token),
    ):
        async with sending(proxy, token, "content-length: 5") as first:
            await first.write(b"h")
            while not upstream.accepted:
                await asyncio.sleep(0.01)
            async with sending(proxy, token, "content-length: 5") as second:
                refused, body = await second.answer()
            await first.write(b"ello")
            answered, _ = await first.answer()
        async with sending(proxy, token, "content-length: 5") as third:
            await third.write(b"hello")
            again, _ = await third.answer()

    assert (refused, json.loads(body)["code"], answered, again) == (503, "overloaded", 200, 200)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Agent, Proxy, Principals]]:
    """Run a real sidecar that keeps files in a directory, and a proxy before it."""
    directory = tmp_path_factory.mktemp("files")
    principals = Principals()
    agent = start_agent(directory, MEDIA_STORAGE_PATH=str(directory / "uploads"))
    try:
        proxy = start_proxy(directory, agent.url, agent.secret, **principals.environment(), PROXY_RATE_LIMIT="off")
        yield agent, proxy, principals
        stop_proxy(proxy.process)
    finally:
        stop(agent.process)


def client(house: tuple[Agent, Proxy, Principals], subject: str, **claims: object) -> httpx.Client:
    """Make a client that signs as `subject`."""
    _, proxy, principals = house
    headers = {"Authorization": f"Bearer {principals.token(subject, **claims)}"}
    return httpx.Client(base_url=proxy.url, headers=headers, timeout=20, trust_env=False)


def test_a_file_comes_back_as_it_went(house: tuple[Agent, Proxy, Principals]) -> None:
    """Byte for byte, under its handle, inert in a browser; its facts tell the handle again."""
    content = bytes(range(256)) * 4096
    with client(house, "alice") as alice:
        sent = alice.post(f"{FILES}/upload", files={"file": ("a.html", content, "text/html")}).raise_for_status()
        told = sent.json()["data"]
        handle = told["file_id"]
        got = alice.get(f"{FILES}/{handle}")
        info = alice.get(f"{FILES}/{handle}/info").raise_for_status().json()["data"]
        where = alice.get(f"{FILES}/{handle}/url").raise_for_status().json()["data"]

    assert got.content == content
    assert (got.headers["content-type"], got.headers["x-content-type-options"]) == (
        "application/octet-stream",
        "nosniff",
    )
    assert "sandbox" in got.headers["content-security-policy"]
    assert (info["file_id"], info["size_bytes"], where["url"]) == (handle, len(content), f"/v1/files/{handle}")


def test_nobody_else_reads_a_file(house: tuple[Agent, Proxy, Principals]) -> None:
    """By the handle, the sidecar's id, one's own seal before it: 404, for its owner too where it is no handle."""
    with client(house, "alice") as alice, client(house, "mallory") as mallory:
        first = alice.post(f"{FILES}/upload", files={"file": ("a.txt", b"the kettle is blue", "text/plain")})
        own = mallory.post(f"{FILES}/upload", files={"file": ("b.txt", b"mine", "text/plain")})
        handle, other = (each.raise_for_status().json()["data"]["file_id"] for each in (first, own))
        file_id = handle.partition("~")[2]
        seal = other.partition("~")[0]
        named = [handle, file_id, f"{seal}~{file_id}", f"~{file_id}", handle.upper(), f"{handle}%00", f"x~{file_id}"]
        attempts = [mallory.get(f"{FILES}/{name}{facet}") for name in named for facet in ("", "/info", "/url")]
        raw = alice.get(f"{FILES}/{file_id}")
        kept = alice.get(f"{FILES}/{handle}").text

    assert {answer.status_code for answer in [*attempts, raw]} == {404}
    assert not [answer for answer in attempts if "kettle" in answer.text]
    assert kept == "the kettle is blue"


def test_a_run_reads_only_ones_own_file(house: tuple[Agent, Proxy, Principals]) -> None:
    """A message that names a file by its handle runs; by another's handle or the sidecar's id it is 404."""

    def run(caller: httpx.Client, name: str, path: str = "/agent/invoke") -> httpx.Response:
        block = {"type": "document", "media": {"kind": "file_id", "file_id": name}}
        body = ask("hi") | {"messages": [{"role": "user", "content": [block]}]}
        return caller.post(path, json=body)

    def say(caller: httpx.Client, name: str) -> httpx.Response:
        part = {"type": "document", "source": {"type": "file", "value": name, "mimeType": "text/plain"}}
        message = {"id": f"m-{name}", "role": "user", "content": [part]}
        return caller.post("/agent/v1/ag-ui", json={"threadId": "files", "runId": "r", "messages": [message]})

    with client(house, "alice") as alice, client(house, "mallory") as mallory:
        upload = alice.post(f"{FILES}/upload", files={"file": ("a.txt", b"the kettle is blue", "text/plain")})
        handle = upload.raise_for_status().json()["data"]["file_id"]
        file_id = handle.partition("~")[2]
        own = [run(alice, handle), say(alice, handle)]
        others = [run(mallory, handle), run(mallory, file_id, "/agent/stream"), say(mallory, handle)]
        others += [say(mallory, file_id), run(alice, file_id)]

    assert [answer.status_code for answer in own] == [200, 200]
    assert [answer.status_code for answer in others] == [404] * 5
    assert "RUN_FINISHED" in own[1].text


def test_reading_and_writing_are_two_rights(house: tuple[Agent, Proxy, Principals]) -> None:
    """Who may upload may not read, and the other way round; without a form there is nothing to upload."""
    with client(house, "alice", scope="files:write") as writer, client(house, "alice", scope="files:read") as reader:
        upload = writer.post(f"{FILES}/upload", files={"file": ("a.txt", b"x", "text/plain")}).raise_for_status()
        handle = upload.json()["data"]["file_id"]
        statuses = [
            writer.get(f"{FILES}/{handle}").status_code,
            reader.get(f"{FILES}/{handle}").status_code,
            reader.post(f"{FILES}/upload", files={"file": ("a.txt", b"x", "text/plain")}).status_code,
            writer.post(f"{FILES}/upload", json={}).status_code,
        ]

    assert statuses == [403, 200, 403, 415]
