"""What the upstream client does with connections, against servers that keep the rules and servers that do not.

Real sockets throughout: an in-process transport proves nothing about what is left in a kernel's buffer.
"""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.model import Deadlines, UpstreamRequest
from proxy.outages import PoolExhausted, UpstreamCut, UpstreamDeadline, UpstreamMalformed, UpstreamProblem
from proxy.upstream import MAX_WAITING_BYTES, Pool, PooledExchange
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, answer, chunk, raw_upstream

PATIENT = Deadlines(connect=5, first_byte=5, idle=5, total=10)
REQUEST = UpstreamRequest(b"POST", b"/v1/graph/invoke", ((b"x-test", b"1"),), b"{}")


@asynccontextmanager
async def pool_for(url: str, *, most: int = 10, most_idle: int = 10, idle_seconds: float = 5) -> AsyncIterator[Pool]:
    """Give a pool and close it."""
    pool = Pool(url, most=most, most_idle=most_idle, idle_seconds=idle_seconds)
    try:
        yield pool
    finally:
        pool.close()


async def begin(pool: Pool, deadlines: Deadlines = PATIENT) -> PooledExchange:
    """Send the request and wait for the head."""
    exchange = await pool.start(REQUEST, deadlines)
    await exchange.head()
    return exchange


async def fetch(pool: Pool, deadlines: Deadlines = PATIENT) -> tuple[int, bytes]:
    """Read one whole answer; cancelled or failed, abandon it, as the relay does."""
    exchange = await pool.start(REQUEST, deadlines)
    try:
        await exchange.head()
        body = b""
        while part := await exchange.read():
            body += part
        return exchange.status, body
    finally:
        exchange.abandon()


async def until(condition: object) -> None:
    """Let the loop turn until `condition()` holds."""
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Give where a Unix socket may be: its path must be short."""
    with tempfile.TemporaryDirectory(prefix="unix-") as name:
        yield Path(name) / "upstream.sock"


@pytest.mark.parametrize("is_unix", [False, True], ids=["tcp", "unix"])
async def test_a_kept_alive_connection_serves_the_next_request(socket_path: Path, *, is_unix: bool) -> None:
    """Two requests in turn take one connection, and each gets its own answer; `Host` is where it was sent."""

    async def talk(line: Line) -> None:
        while request := await line.request():
            upstream.requests.append(request)
            await line.write(answer(b"%d" % line.number))

    at = socket_path if is_unix else ("127.0.0.1", 0)
    async with raw_upstream(talk, at=at) as upstream, pool_for(upstream.url) as pool:
        answers = [await fetch(pool) for _ in range(3)]

        assert answers == [(200, b"1")] * 3
        assert upstream.accepted == 1
        host = b"localhost" if is_unix else upstream.url.removeprefix("http://").encode()
        assert b"\r\nhost: %b\r\n" % host in upstream.requests[0]


async def test_a_full_queue_of_a_unix_socket_is_waited_for(socket_path: Path) -> None:
    """The system refuses at once where it lets TCP wait; here it is a connection later, or the deadline's 504."""
    url = f"http+unix://{socket_path}"
    hasty = Deadlines(connect=0.05, first_byte=5, idle=5, total=10)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(socket_path))
        listener.listen(0)
        first.connect(str(socket_path))  # all that there is room for
        async with pool_for(url) as pool:
            with pytest.raises(UpstreamDeadline) as caught:
                await pool.start(REQUEST, hasty)
            waiting = asyncio.create_task(pool.start(REQUEST, PATIENT))
            await asyncio.sleep(0)
            listener.accept()[0].close()
            exchange = await waiting
            second = listener.accept()[0]
            second.settimeout(5)
            with second:
                assert second.recv(65_536).startswith(b"POST /v1/graph/invoke HTTP/1.1\r\nhost: localhost\r\n")
            exchange.abandon()

    assert caught.value.reason == "connect"
    assert pool.open == 0


MISBEHAVIOUR = {
    "extra bytes after its Content-Length": answer(b"mine") + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret",
    "rubbish after its Content-Length": answer(b"mine") + b"\x00\x01rubbish",
    "two answers": answer(b"mine") + answer(b"secret"),
    "a 204 with a body": b"HTTP/1.1 204 No Content\r\n\r\n" + answer(b"secret"),
    "chunks after the last chunk": CHUNKED_HEAD + chunk(b"mine") + LAST_CHUNK + chunk(b"secret") + LAST_CHUNK,
    "says it will close, and does not": answer(b"mine", "connection: close"),
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-length: 4\r\n\r\nmine",
}


@pytest.mark.parametrize("misbehaviour", MISBEHAVIOUR)
async def test_what_one_answer_leaves_behind_never_reaches_another_caller(misbehaviour: str) -> None:
    """After an answer with anything dirty about it, the connection is not used again."""

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(MISBEHAVIOUR[misbehaviour] if line.number == 1 else answer(b"second"))

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        _, first = await fetch(pool)
        second = await fetch(pool)

        assert first in (b"mine", b"")
        assert second == (200, b"second")
        assert upstream.accepted == 2


async def test_bytes_that_come_while_idle_never_reach_another_caller() -> None:
    """An answer that nobody asked for, sent later on an idle connection, costs that connection its place."""
    stray = asyncio.Event()

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(answer(b"%d" % line.number))
            if line.number == 1:
                await stray.wait()
                await line.write(answer(b"secret"))
                stray.clear()

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)
        stray.set()
        await until(lambda: not stray.is_set())
        second = await fetch(pool)

        assert second == (200, b"2")


async def test_bytes_still_in_the_kernel_are_seen_before_a_connection_is_reused() -> None:
    """A stray answer that the event loop has not read yet is found by asking the socket."""
    import socket as sockets  # noqa: PLC0415  only here: a server outside the event loop

    with sockets.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        async with pool_for(f"http://{host}:{port}") as pool:
            first = asyncio.ensure_future(fetch(pool))
            accepted, _ = await asyncio.to_thread(server.accept)
            await asyncio.to_thread(accepted.recv, 65_536)
            accepted.sendall(answer(b"mine"))
            await first
            # No await from here to the next request, so the loop cannot have read this.
            accepted.sendall(answer(b"secret"))
            second = asyncio.ensure_future(fetch(pool))
            again, _ = await asyncio.to_thread(server.accept)
            await asyncio.to_thread(again.recv, 65_536)
            again.sendall(answer(b"second"))

            assert await second == (200, b"second")
            accepted.close()
            again.close()


FRAMING = {
    "no framing at all": b"HTTP/1.1 200 OK\r\n\r\nbody until the end",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nmine!",
    "length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nmine",
    "a switch of protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "no HTTP": b"220 smtp.example ESMTP\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000,
}


@pytest.mark.parametrize("framing", FRAMING)
async def test_an_answer_whose_end_could_not_be_told_is_refused(framing: str) -> None:
    """Whatever breaks the framing rules is a 502 of its own kind, and nothing is left open."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(FRAMING[framing])
        await line.gone()

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        with pytest.raises(UpstreamMalformed):
            await fetch(pool)

        assert pool.open == 0


async def test_informational_answers_are_passed_over() -> None:
    """100 and 103 come before the answer and are not it."""

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
            await line.write(answer(b"real"))

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        assert await fetch(pool) == (200, b"real")
        assert await fetch(pool) == (200, b"real")
        assert upstream.accepted == 1


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("body", [CHUNKED_HEAD + chunk(b"part"), b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\npart"])
async def test_a_cut_answer_gives_what_came_and_then_the_cut(how: str, body: bytes) -> None:
    """The bytes before the cut are readable, and the end is an error rather than an end."""
    seen = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(body)
        await seen.wait()
        if how == "rst":
            line.reset()

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        exchange = await begin(pool)
        first = await exchange.read()
        seen.set()
        with pytest.raises(UpstreamCut):
            await exchange.read()

        assert first == b"part"
        assert pool.open == 0


async def test_a_head_that_never_comes_meets_its_deadline() -> None:
    """The first-byte deadline closes the connection and says so."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.gone()

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        with pytest.raises(UpstreamDeadline) as raised:
            await fetch(pool, Deadlines(connect=5, first_byte=0.05, idle=5, total=10))

        assert raised.value.reason == "first byte"
        assert pool.open == 0


async def test_a_head_that_comes_byte_by_byte_is_whole() -> None:
    """However many reads it takes, an informational answer before it included; the connection serves again."""
    head = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + answer(b"slow", "x-test: 1")

    async def talk(line: Line) -> None:
        line.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while await line.request():
            for at in range(len(head)):
                await line.write(head[at : at + 1])
                await asyncio.sleep(0)

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        exchange = await begin(pool)
        headers = list(exchange.headers)
        body = b""
        while not exchange.ended:
            body += await exchange.read()

        assert (exchange.status, headers, body) == (200, [(b"content-length", b"4"), (b"x-test", b"1")], b"slow")
        assert await fetch(pool) == (200, b"slow")
        assert upstream.accepted == 1


async def test_a_head_that_drips_without_end_meets_its_deadline() -> None:
    """The answer begins with a whole head: its single bytes do not put the deadline off."""
    dripped = 0

    async def talk(line: Line) -> None:
        nonlocal dripped
        await line.request()
        await line.write(b"HTTP/1.1 200 OK\r\nx: ")
        while True:
            await line.write(b"y")
            dripped += 1
            await asyncio.sleep(0.01)

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        with pytest.raises(UpstreamDeadline) as raised:
            await fetch(pool, Deadlines(connect=5, first_byte=0.1, idle=5, total=10))

        assert raised.value.reason == "first byte"
        assert dripped
        assert pool.open == 0


@pytest.mark.parametrize("before", [0, 0.2])
async def test_a_body_that_stalls_meets_its_deadline(before: float) -> None:
    """The idle deadline counts from the last byte, however long the answer could have taken to begin, or has taken."""

    async def talk(line: Line) -> None:
        await line.request()
        await asyncio.sleep(before)  # longer than the idle deadline, which does not count yet
        await line.write(CHUNKED_HEAD + chunk(b"part"))
        await line.gone()

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        exchange = await begin(pool, Deadlines(connect=5, first_byte=600, idle=0.05, total=700))
        first = await exchange.read()
        with pytest.raises(UpstreamDeadline) as raised:
            await exchange.read()

        assert first == b"part"
        assert raised.value.reason == "idle"


async def test_a_refused_connection_is_a_problem_and_leaves_nothing() -> None:
    """Nobody listening is told at once."""

    async def talk(line: Line) -> None:
        await line.request()

    async with raw_upstream(talk) as upstream:
        url = upstream.url
    async with pool_for(url) as pool:
        with pytest.raises(UpstreamProblem):
            await fetch(pool)

        assert pool.open == 0


async def test_the_pool_is_bounded_and_its_places_come_back() -> None:
    """At the limit a request is refused rather than queued, and a finished one gives its place back."""
    go = asyncio.Event()

    async def talk(line: Line) -> None:
        while await line.request():
            await go.wait()
            await line.write(answer(b"x"))

    async with raw_upstream(talk) as upstream, pool_for(upstream.url, most=1) as pool:
        running = asyncio.ensure_future(fetch(pool))
        await until(lambda: upstream.accepted == 1)
        with pytest.raises(PoolExhausted):
            await fetch(pool)
        go.set()
        await running

        assert await fetch(pool) == (200, b"x")


async def test_idle_connections_are_closed_before_the_sidecar_closes_them() -> None:
    """Nothing stays open past its idle time, with no traffic to find it out."""
    closed = asyncio.Event()

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(answer(b"x"))
        await line.gone()
        closed.set()

    async with raw_upstream(talk) as upstream, pool_for(upstream.url, idle_seconds=0.05) as pool:
        await fetch(pool)
        async with asyncio.timeout(5):
            await closed.wait()

        assert pool.open == 0


async def test_a_reader_that_is_slow_holds_upstream_back() -> None:
    """While nobody reads, at most a socket's buffers and our own bound are taken from upstream."""
    written = 0

    async def talk(line: Line) -> None:
        nonlocal written
        await line.request()
        line.writer.transport.set_write_buffer_limits(0)
        await line.write(CHUNKED_HEAD)
        for _ in range(2000):
            await line.write(chunk(b"x" * 65_536))
            written += 65_536
        await line.write(LAST_CHUNK)

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        exchange = await begin(pool)
        before = -1
        while before != written:  # until upstream makes no more way
            before = written
            for _ in range(200):
                await asyncio.sleep(0)
        held = written
        total = 0
        while part := await exchange.read():
            total += len(part)
            assert len(part) <= MAX_WAITING_BYTES + 300_000

        assert held < 32 << 20
        assert total == 2000 * 65_536


async def test_a_connection_that_was_held_back_serves_the_next_request() -> None:
    """An answer that filled the bound before anybody read it leaves its connection reading again."""
    large = b"x" * (MAX_WAITING_BYTES * 3)

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(answer(large))

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        for _ in range(3):
            exchange = await begin(pool)
            await asyncio.sleep(0.02)  # let it arrive unread
            body = b""
            while not exchange.ended:
                body += await exchange.read()
            assert body == large

        assert upstream.accepted == 1


async def test_cancelling_a_request_gives_its_place_back_and_closes_upstream() -> None:
    """Cancelled while waiting for a head or a body, an exchange leaves no connection behind."""
    gone: list[int] = []

    async def talk(line: Line) -> None:
        await line.request()
        if line.number % 2:
            await line.write(CHUNKED_HEAD)
        await line.gone()
        gone.append(line.number)

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        for number in range(1, 7):
            task = asyncio.ensure_future(fetch(pool))
            await until(lambda number=number: upstream.accepted == number)
            await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: len(gone) == 6)

        assert pool.open == 0


async def test_an_ended_exchange_cannot_touch_the_next_one() -> None:
    """Abandoning an exchange that has ended does nothing to whoever has its connection now."""

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(answer(b"x"))

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        first = await begin(pool)
        while await first.read():
            pass
        second = await begin(pool)
        first.abandon()

        assert await second.read() == b"x"
        assert await second.read() == b""
        assert upstream.accepted == 1


async def test_a_request_is_written_as_the_rules_have_it() -> None:
    """Method, target, host, our fields, and the length of the body."""
    received: list[bytes] = []

    async def talk(line: Line) -> None:
        received.append(await line.request())
        await line.write(answer(b""))

    async with raw_upstream(talk) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)

        host = upstream.url.removeprefix("http://").encode()
        head = b"POST /v1/graph/invoke HTTP/1.1\r\nhost: " + host + b"\r\nx-test: 1\r\ncontent-length: 2\r\n\r\n{}"
        assert received == [head]
