"""The edge as deployed: a real nginx between raw sockets, so that every byte and every closing is seen.

The proxy is a stand-in that each test plays itself; what happens when is ordered by events, never by time.
"""

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import crossplane  # type: ignore[import-untyped]
import pytest

from tests.support.nginx import CONFIG, Nginx, drain, nginx_command, start_nginx, stop, write_config

MIB = 1 << 20
PATIENCE = 20
PROBLEM = "application/problem+json"
# `close`: else nginx may send the next request on the same connection, where no test looks for it.
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"


async def soon[T](awaited: Awaitable[T]) -> T:
    """Await what must come, or fail here: the runner cannot end an asynchronous test that waits for ever."""
    async with asyncio.timeout(PATIENCE):
        return await awaited


@dataclass(frozen=True, slots=True)
class Head:
    """The start line and fields of a request or an answer, names in lower case."""

    start: str
    fields: tuple[tuple[str, str], ...]

    @property
    def status(self) -> int:
        """The status of an answer."""
        return int(self.start.split(" ")[1])

    def all(self, name: str) -> list[str]:
        """Return every value of this field, in order."""
        return [value for key, value in self.fields if key == name]

    def one(self, name: str) -> str:
        """Return the value of a field that is there exactly once."""
        (value,) = self.all(name)
        return value


@dataclass(frozen=True, slots=True)
class Wire:
    """One connection, from either end."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def to(cls, nginx: Nginx) -> Self:
        """Connect to nginx as a client."""
        return cls(*await asyncio.open_connection(nginx.host, nginx.port))

    async def send(self, data: bytes) -> None:
        """Write and wait until it is on its way."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> Head:
        """Read a start line and fields."""
        text = (await soon(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1")
        start, *lines = text.split("\r\n")[:-2]
        fields = (line.partition(":") for line in lines)
        return Head(start, tuple((name.lower(), value.strip()) for name, _, value in fields))

    async def answer(self) -> tuple[Head, bytes]:
        """Read an answer that says how long it is."""
        head = await self.head()
        return head, await self.exactly(int(head.one("content-length")))

    async def exactly(self, size: int) -> bytes:
        """Read so many bytes."""
        return await soon(self.reader.readexactly(size))

    async def chunks(self, size: int) -> bytes:
        """Read chunks until they hold so many bytes; nginx may cut them elsewhere than the proxy did."""
        data = b""
        while len(data) < size:
            length = int(await soon(self.reader.readline()), 16)
            data += (await self.exactly(length + 2))[:-2]
        return data

    async def rest(self) -> bytes:
        """Read until the other end closes."""
        return await soon(self.reader.read())

    async def problem(self) -> tuple[Head, dict[str, Any]]:
        """Read an answer that must be a problem of the edge's own, whole and consistent (RFC 9457)."""
        head, body = await self.answer()
        problem = json.loads(body)
        assert head.one("content-type") == PROBLEM
        assert head.one("cache-control") == "no-store"
        assert head.one("x-request-id") == problem["request_id"]
        assert {"type", "title", "status", "code", "request_id"} <= problem.keys()
        assert problem["status"] == head.status
        return head, problem

    async def close(self) -> None:
        """Hang up; that the other end did so first is no matter."""
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@dataclass(slots=True)
class Upstream:
    """Where nginx thinks the proxy is; each connection waits here for the test to play it."""

    url: str = ""
    connections: int = 0
    _waiting: asyncio.Queue[Wire] = field(default_factory=asyncio.Queue)
    _wires: list[Wire] = field(default_factory=list)

    async def connection(self) -> Wire:
        """Return the next connection nginx made."""
        return await soon(self._waiting.get())

    async def request(self) -> tuple[Wire, Head]:
        """Return the next connection, and the head of the first request on it."""
        wire = await self.connection()
        return wire, await wire.head()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take note of a connection."""
        self.connections += 1
        self._wires.append(Wire(reader, writer))
        self._waiting.put_nowait(self._wires[-1])

    def abort(self) -> None:
        """Hang up on everybody, whatever is still to be sent."""
        for wire in self._wires:
            wire.writer.transport.abort()


@dataclass(frozen=True, slots=True)
class Edge:
    """Nginx with its stand-in proxy, and the clients a test connected."""

    nginx: Nginx
    upstream: Upstream
    clients: list[Wire] = field(default_factory=list)

    async def client(self, request: bytes = b"") -> Wire:
        """Connect a client that sends this first."""
        wire = await Wire.to(self.nginx)
        self.clients.append(wire)
        await wire.send(request)
        return wire

    async def stream(self) -> tuple[Wire, Wire]:
        """Open a stream whose first event has arrived; return its client's and its proxy's wire."""
        client = await self.client(post("/agent/stream", b"{}", "Accept-Encoding: gzip"))
        proxy, _ = await self.upstream.request()
        await proxy.send(STREAM_HEAD + chunk(b"first"))
        await client.head()
        assert await client.exactly(len(chunk(b"first"))) == chunk(b"first")
        return client, proxy

    async def logged(self, request_id: str) -> dict[str, object]:
        """Wait for the access line of this request."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for line in self.nginx.access_lines():
                    if line["request_id"] == request_id:
                        return line
                await asyncio.sleep(0.01)


@asynccontextmanager
async def edge_in(directory: Path) -> AsyncIterator[Edge]:
    """Run nginx in this directory, before a proxy that waits to be played."""
    upstream = Upstream()
    server = await asyncio.start_server(upstream.accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    upstream.url = f"http://{host}:{port}"
    edge = Edge(start_nginx(directory, upstream.url), upstream)
    try:
        yield edge
    finally:
        stop(edge.nginx)
        for client in edge.clients:
            client.writer.transport.abort()
        upstream.abort()
        server.close()
        await server.wait_closed()


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    """Give each test an nginx and a proxy of its own."""
    async with edge_in(tmp_path) as edge:
        yield edge


def get(target: str, *fields: str) -> bytes:
    """Write a GET with these fields."""
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: edge.test", *fields, "", ""]).encode()


def post(target: str, body: bytes = b"{}", *fields: str, length: int | None = None) -> bytes:
    """Write a POST with this body, or with the beginning of one of this length."""
    size = f"Content-Length: {len(body) if length is None else length}"
    head = [f"POST {target} HTTP/1.1", "Host: edge.test", "Content-Type: application/json", size, *fields]
    return "\r\n".join([*head, "", ""]).encode() + body


def chunk(data: bytes) -> bytes:
    """Frame as one chunk (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def reply(status: str, body: bytes, *fields: str) -> bytes:
    """Write an answer of known length."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(head).encode() + body


def directives(name: str) -> list[list[str]]:
    """Return the arguments of each directive of this name in the deployed configuration."""

    def walk(block: list[dict[str, Any]]) -> list[list[str]]:
        here = [entry["args"] for entry in block if entry["directive"] == name]
        return here + [args for entry in block for args in walk(entry.get("block", []))]

    parsed: list[dict[str, Any]] = crossplane.parse(str(CONFIG))["config"][0]["parsed"]
    return walk(parsed)


def test_deployed_configuration_is_accepted(tmp_path: Path) -> None:
    """`nginx -t` finds nothing to say about the file, as a user without privileges runs it."""
    config = write_config(tmp_path, listen="127.0.0.1:8080", upstream="http://127.0.0.1:1")

    test = subprocess.run(nginx_command(tmp_path, config, "-t", "-q"), capture_output=True, check=False, timeout=30)

    assert (test.returncode, test.stdout, test.stderr) == (0, b"", b"")


async def test_event_arrives_before_the_next_is_written(edge: Edge) -> None:
    """Each event of a stream passes when it is written, whatever its size; so does half of one."""
    client, proxy = await edge.stream()

    for event in (b"x", b"data: " + b"y" * 5000, b"z"):
        await proxy.send(chunk(event))
        assert await client.chunks(len(event)) == event
    await proxy.send(b"a\r\nhalf ")
    assert await client.chunks(5) == b"half "
    await proxy.send(b"whole\r\n")
    assert await client.chunks(5) == b"whole"

    await proxy.send(LAST_CHUNK)
    assert await client.exactly(len(LAST_CHUNK)) == LAST_CHUNK


async def test_request_body_passes_as_it_comes(edge: Edge) -> None:
    """A request body is not held back until it is whole, be its length known or not."""
    known = await edge.client(post("/agent/invoke", b'{"mess', length=8))
    proxy, head = await edge.upstream.request()
    assert head.one("content-length") == "8"
    assert await proxy.exactly(6) == b'{"mess'
    await known.send(b"ag")
    assert await proxy.exactly(2) == b"ag"

    chunked = await edge.client(get("/agent/invoke", "Transfer-Encoding: chunked").replace(b"GET", b"POST"))
    await chunked.send(chunk(b"part"))
    proxy, head = await edge.upstream.request()
    assert head.one("transfer-encoding") == "chunked"
    assert await proxy.exactly(len(chunk(b"part"))) == chunk(b"part")
    await chunked.send(LAST_CHUNK)
    assert await proxy.exactly(len(LAST_CHUNK)) == LAST_CHUNK


async def test_forwarding_fields_are_overwritten(edge: Edge) -> None:
    """What a client says about its own address, scheme or connection never reaches the proxy."""
    await edge.client(
        get(
            "/agent/v1/threads",
            "X-Forwarded-For: 10.0.0.1",
            "X-Forwarded-For: 10.0.0.2",
            "X_Forwarded_For: 10.0.0.3",
            "X-Forwarded-Proto: https",
            "X-Forwarded-Host: evil.test",
            "X-Forwarded-Port: 1",
            "X-Forwarded-Prefix: /evil",
            "X-Real-IP: 10.0.0.4",
            "Forwarded: for=10.0.0.5",
            "X-Original-URL: /metrics",
            "X-Rewrite-URL: /metrics",
            "Proxy: http://evil.test",
            "Proxy-Authorization: Basic eDp5",
            "Connection: close, X-Forwarded-For, Authorization",
            "Keep-Alive: timeout=900",
            "TE: trailers",
            "Upgrade: h2c",
            "Authorization: Bearer kept",
            "X-API-Key: kept",
            "Accept: text/event-stream",
        )
    )

    _, head = await edge.upstream.request()

    expected = {
        "host": "edge.test",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "http",
        "x-request-id": head.one("x-request-id"),
        "authorization": "Bearer kept",
        "x-api-key": "kept",
        "accept": "text/event-stream",
    }
    assert sorted(head.fields) == sorted(expected.items())


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (["X-Request-Id: abc-1:2/3"], True),
        ([f"X-Request-Id: {'a' * 128}"], True),
        ([f"X-Request-Id: {'a' * 129}"], False),
        (['X-Request-Id: a"b'], False),
        (["X-Request-Id: a", "X-Request-Id: b"], False),
        ([], False),
    ],
)
async def test_request_id_is_kept_or_made(edge: Edge, sent: list[str], *, kept: bool) -> None:
    """The proxy and the access log get the same one id: the client's if it is a safe one, else a new one."""
    client = await edge.client(get("/agent/v1/threads", *sent))
    proxy, head = await edge.upstream.request()
    await proxy.send(reply("200 OK", b"{}"))
    await client.answer()

    request_id = head.one("x-request-id")

    assert (sent[:1] == [f"X-Request-Id: {request_id}"]) is kept
    assert kept or (len(request_id) == 32 and int(request_id, 16))
    assert (await edge.logged(request_id))["status"] == 200


@pytest.mark.parametrize(
    "target",
    [
        "/agent//v1///threads/a%2Fb%2fc",
        "/agent/v1/threads/%41%20%c3%a9;p=1?search=%00&x=//&y=a+b",
        "/agent/v1/graph/./x/../invoke",
        "/agent/v1/graph:StateSchema?",
    ],
)
async def test_target_passes_as_written(edge: Edge, target: str) -> None:
    """The proxy judges the very target the client sent: nothing is decoded, merged or resolved on the way."""
    await edge.client(get(target))

    _, head = await edge.upstream.request()

    assert head.start == f"GET {target} HTTP/1.1"


async def test_paths_outside_the_list_end_here(edge: Edge) -> None:
    """Only the agent's, the health and the documentation paths exist at the edge; the proxy hears of no other."""
    targets = [
        "/",
        "/agent",
        "/Agent/invoke",
        "//agent/invoke",
        "/agent/../metrics",
        "/agent/%2e%2e/metrics",
        "/agent/..%2Fmetrics",
        "/metrics",
        "/metrics?x=/agent/",
        "/health",
        "/health/",
        "/health/live/",
        "/health/started",
        "/docs/",
        "/docs/oauth2-redirect",
        "/openapi.json/x",
        "/redoc",
        "/ping",
        "/v1/graph/invoke",
        "/nginx/problem",
    ]
    client = await edge.client()

    answers = {}
    for target in targets:
        await client.send(get(target))
        _, problem = await client.problem()
        answers[target] = (problem["status"], problem["code"])

    assert answers == dict.fromkeys(targets, (404, "not_found"))
    assert edge.upstream.connections == 0


@pytest.mark.parametrize("path", ["/agent/x", "/health/live", "/health/ready", "/docs", "/openapi.json"])
async def test_listed_paths_reach_the_proxy(edge: Edge, path: str) -> None:
    """What the proxy serves to the outside passes the edge."""
    client = await edge.client(get(path))
    proxy, head = await edge.upstream.request()
    await proxy.send(reply("200 OK", b"mine"))

    _, body = await client.answer()

    assert head.start == f"GET {path} HTTP/1.1"
    assert body == b"mine"


@pytest.mark.parametrize("status", [400, 401, 404, 405, 408, 413, 414, 421, 429, 500, 501, 502, 503, 504])
async def test_errors_of_the_proxy_pass_untouched(edge: Edge, status: int) -> None:
    """An error that the proxy explained keeps its body, its fields and their repetitions."""
    body = b'{"type":"https://problems.test/own","code":"own"}'
    fields = (
        "Content-Type: application/problem+json",
        "Retry-After: 18",
        'RateLimit: "requests";r=0;t=18',
        'WWW-Authenticate: Bearer realm="agent"',
        'WWW-Authenticate: ApiKey realm="agent"',
        "X-Request-Id: own",
    )
    client = await edge.client(post("/agent/invoke"))
    proxy, _ = await edge.upstream.request()
    await proxy.send(reply(f"{status} Own Phrase", body, *fields))

    head, received = await client.answer()

    assert (head.start, received) == (f"HTTP/1.1 {status} Own Phrase", body)
    sent = [field.split(": ", 1) for field in fields]
    assert [list(pair) for pair in head.fields if pair[0] in {name.lower() for name, _ in sent}] == [
        [name.lower(), value] for name, value in sent
    ]


async def test_answers_cannot_steer_nginx(edge: Edge) -> None:
    """X-Accel-… fields of an answer neither redirect inside nginx nor turn buffering on nor get out."""
    client = await edge.client(get("/agent/v1/threads"))
    proxy, _ = await edge.upstream.request()
    steering = ("X-Accel-Redirect: /nginx/health", "X-Accel-Buffering: yes", "X-Accel-Limit-Rate: 1")
    await proxy.send(reply("200 OK", b"mine", *steering, "Location: http://agent_proxy/agent/"))

    head, body = await client.answer()

    assert (head.status, body) == (200, b"mine")
    assert not [name for name, _ in head.fields if name.startswith("x-accel")]
    assert head.one("location") == "http://agent_proxy/agent/"
    assert head.one("server") == "nginx"


async def test_unreachable_proxy_is_502(tmp_path: Path) -> None:
    """With no proxy to be reached the client gets a problem that says so, and may try again."""
    async with edge_in(tmp_path) as edge:
        pass  # the port of a proxy that has gone
    nginx = start_nginx(tmp_path, edge.upstream.url)
    client = await Wire.to(nginx)
    try:
        await client.send(post("/agent/invoke"))
        head, problem = await client.problem()
    finally:
        await client.close()
        stop(nginx)

    assert (head.status, problem["code"], problem["type"]) == (502, "proxy_unreachable", "about:blank")
    assert head.one("retry-after") == "1"


@pytest.mark.parametrize("reused", [False, True])
async def test_run_is_never_sent_twice(edge: Edge, *, reused: bool) -> None:
    """A proxy that dies over a run, on a new or a kept connection, gets it no second time."""
    client, proxy = await kept_connection(edge) if reused else (await edge.client(), None)
    await client.send(post("/agent/invoke"))
    if proxy is None:
        proxy = await edge.upstream.connection()
    request = await proxy.head()
    await proxy.close()

    head, _ = await client.problem()

    assert request.start == "POST /agent/invoke HTTP/1.1"
    assert head.status == 502
    assert edge.upstream.connections == 1


async def test_reading_is_tried_again_where_a_kept_connection_closed(edge: Edge) -> None:
    """A GET that met the closing of an idle connection is asked once more, on a new one (RFC 9110, section 9.2.2)."""
    client, proxy = await kept_connection(edge)
    await client.send(get("/agent/v1/threads"))
    await proxy.head()
    await proxy.close()

    again, request = await edge.upstream.request()
    await again.send(reply("200 OK", b"{}"))
    head, body = await client.answer()

    assert request.start == "GET /agent/v1/threads HTTP/1.1"
    assert (head.status, body) == (200, b"{}")
    assert edge.upstream.connections == 2


async def kept_connection(edge: Edge) -> tuple[Wire, Wire]:
    """Give a client, and the connection that nginx has kept to the proxy after a first request."""
    client = await edge.client()
    await client.send(get("/health/live"))
    proxy, _ = await edge.upstream.request()
    await proxy.send(reply("200 OK", b"{}"))
    await client.answer()
    return client, proxy


async def test_hang_up_reaches_the_proxy(edge: Edge) -> None:
    """A client that leaves a stream ends it at the proxy too, also while nothing flows."""
    client, proxy = await edge.stream()

    await client.close()

    assert await proxy.rest() == b"{}"


async def test_hang_up_before_the_answer_reaches_the_proxy(edge: Edge) -> None:
    """A client that leaves before its answer has begun is noticed as well, and logged as such."""
    client = await edge.client(post("/agent/invoke", b"{}", "X-Request-Id: left"))
    proxy, _ = await edge.upstream.request()

    await client.close()

    assert await proxy.rest() == b"{}"
    line = await edge.logged("left")
    assert (line["status"], line["client_left"]) == (499, True)


@pytest.mark.parametrize(
    "rest", [b"", b"5\r\nsec", b"6\r\nsecond\r\n"], ids=["nothing more", "half a chunk", "no last chunk"]
)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_cut_stream_stays_cut(edge: Edge, rest: bytes, *, reset: bool) -> None:
    """A stream that the proxy breaks off never ends well at the client."""
    client, proxy = await edge.stream()

    await proxy.send(rest)
    if reset:
        proxy.writer.transport.abort()
    else:
        await proxy.close()

    try:
        received = await client.rest()
    except ConnectionResetError:
        received = b""
    assert not received.endswith(LAST_CHUNK)


async def test_short_answer_stays_short(edge: Edge) -> None:
    """An answer with fewer bytes than it announced is not filled up or re-framed."""
    client = await edge.client(post("/agent/invoke"))
    proxy, _ = await edge.upstream.request()
    await proxy.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
    await proxy.close()

    head = await client.head()

    assert head.one("content-length") == "100"
    assert await client.rest() == b"only this"


async def test_body_over_the_limit_is_413(edge: Edge) -> None:
    """A body that is too large by its own word is refused before the proxy hears of it."""
    client = await edge.client(post("/agent/invoke", b"", length=2 * MIB))

    head, problem = await client.problem()

    assert (head.status, problem["code"]) == (413, "body_too_large")
    assert edge.upstream.connections == 0


async def test_body_that_grows_over_the_limit_is_413(edge: Edge) -> None:
    """A body without a length is refused when it has become too large, and its request abandoned."""
    client = await edge.client(get("/agent/invoke", "Transfer-Encoding: chunked").replace(b"GET", b"POST"))
    proxy, _ = await edge.upstream.request()
    reading = asyncio.create_task(proxy.rest())
    await client.send(chunk(b"x" * (2 * MIB)) + LAST_CHUNK)

    head, problem = await client.problem()

    assert (head.status, problem["code"]) == (413, "body_too_large")
    assert not (await reading).endswith(LAST_CHUNK)


async def test_proxy_refuses_what_is_just_over_its_own_limit(edge: Edge) -> None:
    """A body a little over 1 MiB reaches the proxy, whose own 413 is the answer."""
    body = b"x" * (MIB + 1)
    client = await edge.client()
    sending = asyncio.create_task(client.send(post("/agent/invoke", body)))
    proxy, _ = await edge.upstream.request()
    await proxy.exactly(len(body))
    await proxy.send(reply("413 Content Too Large", b"mine", "Connection: close"))

    head, received = await client.answer()
    await sending

    assert (head.status, received) == (413, b"mine")


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"NONSENSE\r\n\r\n", 400, "invalid_request"),
        (b"GET /agent/%zz HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"GET /agent/%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"GET /agent/x HTTP/1.1\r\n\r\n", 400, "invalid_request"),
        (b"GET /agent/x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "invalid_request"),
        (post("/agent/x", b"0\r\n\r\n", "Transfer-Encoding: chunked"), 400, "invalid_request"),
        (post("/agent/x", b"{}", "Content-Length: 2"), 400, "invalid_request"),
        (b"TRACE /agent/x HTTP/1.1\r\nHost: a\r\n\r\n", 405, "method_not_allowed"),
        (b"GET /agent/" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "uri_too_long"),
        (get("/agent/x", f"Authorization: Bearer {'x' * 9000}"), 431, "headers_too_large"),
        (get("/agent/x", *(f"X-{n}: {'x' * 4000}" for n in range(12))), 431, "headers_too_large"),
        (b"GET /agent/x HTTP/9.0\r\nHost: a\r\n\r\n", 505, "edge_error"),
    ],
    ids=[
        "no request line",
        "bad escape",
        "zero byte",
        "no host",
        "two hosts",
        "two framings",
        "two lengths",
        "trace",
        "long target",
        "long field",
        "many fields",
        "unknown version",
    ],
)
async def test_bad_requests_are_problems(edge: Edge, request_: bytes, status: int, code: str) -> None:
    """What HTTP itself forbids, smuggling attempts included, is refused with a problem and goes no further."""
    client = await edge.client(request_)

    head, problem = await client.problem()

    assert (head.status, problem["code"]) == (status, code)
    assert edge.upstream.connections == 0


async def test_one_address_has_so_many_connections(edge: Edge) -> None:
    """An address with all its streams open gets 429 for another one, and a place again when one ends."""
    ((_, cap),) = {tuple(each) for each in directives("limit_conn")}  # the same wherever it stands
    streams = [await edge.stream() for _ in range(int(cap))]

    client = await edge.client(post("/agent/stream"))
    head, problem = await client.problem()
    assert (head.status, problem["code"]) == (429, "too_many_connections")
    assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert problem["violated-policies"] == ["connections"]
    assert head.one("retry-after") == "1"
    assert edge.upstream.connections == len(streams)

    ended, proxy = streams[0]
    await proxy.send(LAST_CHUNK)
    await ended.exactly(len(LAST_CHUNK))
    answering = asyncio.create_task(answer_next(edge.upstream))
    while head.status == 429:
        await client.send(post("/agent/stream"))
        head, _ = await client.answer()
    await answering
    assert head.status == 200


async def answer_next(upstream: Upstream) -> None:
    """Answer the next request on a connection of its own."""
    wire, _ = await upstream.request()
    await wire.send(reply("200 OK", b"{}"))


async def test_secrets_are_not_logged(edge: Edge) -> None:
    """Neither log ever holds a credential, a query or a body, not even of a request that fails."""
    secret = secrets.token_hex(16)
    ids = [secrets.token_hex(8) for _ in range(4)]
    fields = [f"Authorization: Bearer {secret}", f"X-API-Key: {secret}", f"Cookie: session={secret}"]
    client = await edge.client()
    for request_id in ids:
        await client.send(
            post(f"/agent/invoke?api_key={secret}", secret.encode(), *fields, f"X-Request-Id: {request_id}")
        )
        proxy, _ = await edge.upstream.request()
        if request_id == ids[0]:
            await proxy.close()  # a failure that nginx would quote the request for
        elif request_id == ids[1]:
            await proxy.send(b"HTTP/1.1 200 OK\r\nbroken\x00: field\r\n\r\n")
            await proxy.close()
        else:
            await proxy.send(reply("200 OK", secret.encode(), f"Set-Cookie: {secret}", "Connection: close"))
        await client.answer()
    malformed = await edge.client(f"GET /agent/%zz?key={secret} HTTP/1.1\r\nbad {secret}\r\n\r\n".encode())
    await malformed.problem()

    lines = [await edge.logged(request_id) for request_id in ids]

    assert [line["status"] for line in lines] == [502, 502, 200, 200]
    assert {(line["method"], line["path"]) for line in lines} == {("POST", "/agent/invoke")}
    assert secret not in edge.nginx.access_log()
    assert secret not in edge.nginx.error_log()


async def test_access_line_says_what_happened(edge: Edge) -> None:
    """A line is JSON with the path as written, the outcome, and where the time went, whatever the client sent."""
    client = await edge.client(get('/agent/"%22//?q', "X-Request-Id: hard-1"))
    proxy, _ = await edge.upstream.request()
    await proxy.send(reply("200 OK", b"{}"))
    await client.answer()

    line = await edge.logged("hard-1")

    assert line["path"] == '/agent/"%22//'
    assert (line["method"], line["client"], line["status"]) == ("GET", "127.0.0.1", 200)
    assert (line["upstream_status"], line["client_left"]) == ("200", False)
    assert isinstance(line["duration_s"], float)
    assert float(str(line["upstream_first_byte_s"])) >= 0


@pytest.mark.parametrize("path", [b"/agent/caf\xe9/x", b"/agent/caf\xc3\xa9/x", b"/agent/caf\xff\xfe?q"])
async def test_a_line_is_json_whatever_bytes_a_path_has(edge: Edge, path: bytes) -> None:
    """What is no ASCII ends the path in the log, not the log: every line stays readable by machines."""
    client = await edge.client(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\nX-Request-Id: bytes-1\r\n\r\n")
    proxy, _ = await edge.upstream.request()
    await proxy.send(reply("200 OK", b"{}"))
    await client.answer()

    line = await edge.logged("bytes-1")

    assert (line["path"], line["status"]) == ("/agent/caf", 200)


async def test_health_is_nginx_own(edge: Edge) -> None:
    """/nginx/health needs no proxy, and is not worth a line in the log."""
    client = await edge.client(get("/nginx/health"))

    head, body = await client.answer()

    assert (head.status, body) == (200, b"ok\n")
    assert edge.upstream.connections == 0
    assert edge.nginx.access_log() == ""


def test_no_worker_can_be_held_up_by_a_socket(tmp_path: Path) -> None:
    """None of them blocks, the listening one too: who comes second to a new connection goes on with those it has."""
    nginx = start_nginx(tmp_path, "http://127.0.0.1:9")
    try:
        master = nginx.process.pid
        workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        told = []
        for fd in [fd for pid in workers for fd in Path(f"/proc/{pid}/fd").iterdir()]:
            with contextlib.suppress(FileNotFoundError):  # a worker that begins closes what it does not need
                if fd.readlink().name.startswith("socket:"):
                    told.append((fd.parents[1] / "fdinfo" / fd.name).read_text())
    finally:
        stop(nginx)

    assert len(workers) == 2
    assert told
    assert all(int(text.split("flags:")[1].split()[0], 8) & os.O_NONBLOCK for text in told)


async def test_draining_lets_a_stream_end(edge: Edge) -> None:
    """Asked to stop, nginx accepts nobody, goes on relaying what runs, and then exits cleanly."""
    client, proxy = await edge.stream()

    drain(edge.nginx)
    await refused(edge.nginx)
    await proxy.send(chunk(b"second"))
    assert await client.chunks(6) == b"second"
    await proxy.send(chunk(b"third") + LAST_CHUNK)

    assert await client.rest() == chunk(b"third") + LAST_CHUNK
    await client.close()
    assert await asyncio.to_thread(edge.nginx.process.wait, 20) == 0


async def refused(nginx: Nginx) -> None:
    """Wait until nginx takes no new connection."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                wire = await Wire.to(nginx)
            except ConnectionRefusedError:
                return
            await wire.close()
            await asyncio.sleep(0.01)
