"""What the server writes of an answer: in how few writes, framed how, and what it refuses to write at all."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from proxy.model import BODY_FOLLOWS, Headers, Message, Receive, Scope, Send
from proxy.protocol import OneAtATime

REQUEST = b"GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n"
DATE = (b"date", b"Sat, 21 Nov 2026 10:00:00 GMT")
type Answer = Callable[[Send], Any]


@dataclass
class Wire(asyncio.Transport):
    """A transport that keeps each write."""

    written: list[bytes] = field(default_factory=list)
    closed: bool = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 6)}.get(name, default)


def connect(answer: Answer, clock: Any = None) -> tuple[OneAtATime, Wire]:
    """Open a connection to an application that answers every request so; its timers run by `clock`, if there is one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send)

    config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_keep_alive=75)
    config.load()
    state = ServerState()
    state.default_headers = [DATE]
    protocol, wire = OneAtATime(config, state, {}, _loop=clock or asyncio.get_running_loop()), Wire()
    protocol.connection_made(wire)
    return protocol, wire


async def answered(answer: Answer, request: bytes = REQUEST) -> Wire:
    """Have one request answered, to the end of the application."""
    protocol, wire = connect(answer)
    protocol.data_received(request)
    await asyncio.gather(*protocol.tasks)
    return wire


def start(headers: Headers, *, follows: bool = False) -> Message:
    """Write the message that begins an answer."""
    message: Message = {"type": "http.response.start", "status": 200, "headers": headers}
    if follows:
        message[BODY_FOLLOWS] = True
    return message


def body(data: bytes, *, more: bool = False) -> Message:
    """Write a message with bytes of an answer."""
    return {"type": "http.response.body", "body": data, "more_body": more}


def answering(*messages: Message) -> Answer:
    """Send these."""

    async def send_all(send: Send) -> None:
        for message in messages:
            await send(message)

    return send_all


LENGTH = (b"content-length", b"2")
HEAD = b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 10:00:00 GMT\r\n"


@pytest.mark.parametrize(
    ("messages", "written"),
    [
        ([start([LENGTH], follows=True), body(b"hi")], [HEAD + b"content-length: 2\r\n\r\nhi"]),
        ([start([LENGTH]), body(b"hi")], [HEAD + b"content-length: 2\r\n\r\n", b"hi"]),
        (
            [start([], follows=True), body(b"hi", more=True), body(b"ho")],
            [HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", b"2\r\nho\r\n0\r\n\r\n"],
        ),
        ([start([], follows=True), body(b"")], [HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n"]),
        ([start([(b"Content-Length", b"0")], follows=True), body(b"")], [HEAD + b"content-length: 0\r\n\r\n"]),
    ],
)
async def test_an_answer_is_written_at_once(messages: list[Message], written: list[bytes]) -> None:
    """A head whose body follows goes out with it, any other by itself; chunks where no length is told."""
    wire = await answered(answering(*messages))

    assert (wire.written, wire.closed) == (written, False)


async def test_an_answer_to_head_has_no_body() -> None:
    """RFC 9110 §9.3.2: the fields of the answer, and nothing after them."""
    wire = await answered(answering(start([LENGTH], follows=True), body(b"hi")), REQUEST.replace(b"GET", b"HEAD"))

    assert wire.written == [HEAD + b"content-length: 2\r\n\r\n"]


async def test_a_client_that_closes_is_told_so() -> None:
    """RFC 9112 §9.6."""
    request = REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    wire = await answered(answering(start([LENGTH], follows=True), body(b"hi")), request)

    assert wire.written == [HEAD + b"content-length: 2\r\nconnection: close\r\n\r\nhi"]
    assert wire.closed


@pytest.mark.parametrize("header", [
    (b"x", b"a\r\nset-cookie: b"), (b"x", b"a\nb"), (b"x", b"a\rb"), (b"x", b"\0"), (b"x", b"\x7f"), (b"x", b"a\r\n"),
    (b"x y", b"a"), (b"x\r\ny", b"a"), (b"x:", b"a"), (b"", b"a"),
])  # fmt: skip
async def test_no_field_writes_another(header: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture) -> None:
    """What would end a line, or could not be a field's, is not written: an error is, and the connection closes."""
    with caplog.at_level(logging.CRITICAL):
        wire = await answered(answering(start([header, LENGTH], follows=True), body(b"hi")))

    assert b"".join(wire.written) == b"" or wire.written[0].startswith(b"HTTP/1.1 500 ")
    assert wire.closed


@given(value=st.binary(max_size=40))
def test_a_value_stays_one_line(value: bytes) -> None:
    """Whatever a value holds, it is written as it is, in its one line, or not at all."""

    async def ask() -> Wire:
        logging.getLogger("uvicorn.error").disabled = True
        try:
            return await answered(answering(start([(b"x", value), LENGTH], follows=True), body(b"hi")))
        finally:
            logging.getLogger("uvicorn.error").disabled = False

    wire = asyncio.run(ask())
    whole = HEAD + b"x: " + value + b"\r\ncontent-length: 2\r\n\r\nhi"
    may_stand = all(byte == ord("\t") or (byte >= ord(" ") and byte != 0x7F) for byte in value)
    assert (wire.written == [whole]) == may_stand
    assert wire.closed != may_stand


@pytest.mark.parametrize("messages", [
    [start([LENGTH]), body(b"long")],
    [start([LENGTH]), body(b"l")],
    [start([LENGTH], follows=True), body(b"l")],
    [start([LENGTH]), start([LENGTH])],
    [body(b"hi")],
])  # fmt: skip
async def test_what_is_no_answer_is_cut(messages: list[Message], caplog: pytest.LogCaptureFixture) -> None:
    """A body of another length than was told never looks whole: the connection ends."""
    with caplog.at_level(logging.CRITICAL):
        wire = await answered(answering(*messages))

    assert wire.closed
    assert b"long" not in b"".join(wire.written)


async def test_a_client_that_does_not_read_is_waited_for() -> None:
    """What is sent meanwhile is written when it reads on, a head that waits for its body included."""
    begun = asyncio.Event()

    async def answer(send: Send) -> None:
        await send(start([LENGTH], follows=True))
        begun.set()
        await send(body(b"hi"))

    protocol, wire = connect(answer)
    protocol.pause_writing()
    protocol.data_received(REQUEST)
    for _ in range(5):
        await asyncio.sleep(0)
    before = begun.is_set(), list(wire.written)
    protocol.resume_writing()
    await asyncio.gather(*protocol.tasks)

    assert before == (False, [])
    assert wire.written == [HEAD + b"content-length: 2\r\n\r\nhi"]


class Clock:
    """An event loop's clock, and the one timer that is set by it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.create_task = asyncio.get_running_loop().create_task
        self.create_future = asyncio.get_running_loop().create_future

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> object:
        self.timers.append((when, call))
        return self.timers[-1]

    def pass_to(self, now: float) -> None:
        """Go on to a time, and run what was due by then."""
        self.now = now
        due, self.timers = [each for each in self.timers if each[0] <= now], [t for t in self.timers if t[0] > now]
        for _, call in due:
            call()


async def test_a_kept_connection_is_closed_when_nobody_uses_it() -> None:
    """Only after so long without a request, however many came before, and never while one is answered."""
    release = asyncio.Event()
    release.set()

    async def answer(send: Send) -> None:
        await release.wait()
        await answering(start([LENGTH], follows=True), body(b"hi"))(send)

    protocol, wire = connect(answer, clock := Clock())
    seen = []
    for now in (10, 80, 150):  # it is used again before it was idle for 75 s
        clock.pass_to(now)
        protocol.data_received(REQUEST)
        await asyncio.gather(*protocol.tasks)
        seen.append((wire.closed, len(clock.timers)))
    release.clear()
    protocol.data_received(REQUEST)
    clock.pass_to(400)
    seen.append((wire.closed, len(clock.timers)))
    release.set()
    await asyncio.gather(*protocol.tasks)
    for now in (474, 475):
        clock.pass_to(now)
        seen.append((wire.closed, len(clock.timers)))

    assert seen == [(False, 1), (False, 1), (False, 1), (False, 0), (False, 1), (True, 0)]


async def test_a_body_that_was_answered_unread_does_not_hold_its_connection() -> None:
    """Whoever is refused before his body is read has as long for the rest of it as for another request."""
    protocol, wire = connect(answering(start([LENGTH], follows=True), body(b"hi")), clock := Clock())
    protocol.data_received(b"POST /agent/invoke HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    await asyncio.gather(*protocol.tasks)
    seen = []
    for now in (30, 60, 75):
        protocol.data_received(b"1\r\nx\r\n")
        clock.pass_to(now)
        seen.append(wire.closed)

    assert seen == [False, False, True]


@pytest.mark.parametrize(("sent", "closed_at"), [(b"", 75), (b"\r\n", 75), (b"GET /", 105)])
async def test_a_head_is_not_waited_for_without_end(sent: bytes, closed_at: int) -> None:
    """Whoever connects has as long to begin as anybody between two requests, and as long again for the whole head."""
    protocol, wire = connect(answering(start([LENGTH], follows=True), body(b"hi")), clock := Clock())
    clock.pass_to(30)
    protocol.data_received(sent)
    for now in range(31, closed_at):
        clock.pass_to(now)
        protocol.data_received(b"a" * bool(sent.strip()))
    was_closed = wire.closed
    clock.pass_to(closed_at)

    assert (was_closed, wire.closed) == (False, True)


async def test_a_lost_connection_leaves_no_timer() -> None:
    """A timer would keep all that the connection held."""
    protocol, _ = connect(answering(start([LENGTH], follows=True), body(b"hi")))
    protocol.data_received(REQUEST)
    await asyncio.gather(*protocol.tasks)
    timer = protocol.timeout_keep_alive_task
    protocol.connection_lost(None)

    assert timer is not None
    assert timer.cancelled()
