"""Bytes that go on in the callback that brings them: when they do, when they wait for a task, and how that ends.

The exchange is real, the connection under it never opened.
"""

import asyncio
import socket
from dataclasses import dataclass, field

import pytest

from proxy.errors import BudgetSpentMidway
from proxy.model import Deadlines
from proxy.upstream import MAX_WAITING_BYTES, Connection, PooledExchange

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class Sink:
    """An outlet that keeps what it is given, or raises `fault`."""

    is_open: bool = True
    fault: Exception | None = None
    got: list[bytes] = field(default_factory=list)

    def pass_on(self, data: bytes) -> None:
        self.got.append(data)
        if self.fault is not None:
            raise self.fault


def chunk(data: bytes) -> bytes:
    """Write one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def reading(outlet: Sink) -> tuple[PooledExchange, asyncio.Task[bytes]]:
    """Open an exchange whose head has come, and a task that waits for more."""
    exchange = PooledExchange(Connection(lambda _: None), Deadlines(5, 5, 5, 5))
    exchange.feed(HEAD)
    task = asyncio.get_running_loop().create_task(exchange.read(outlet))
    await asyncio.sleep(0)
    return exchange, task


async def test_what_arrives_goes_to_an_open_outlet_and_wakes_nobody() -> None:
    """Each read goes on at once; the end is for who waits."""
    sink = Sink()
    exchange, task = await reading(sink)

    exchange.feed(chunk(b"one"))
    exchange.feed(chunk(b"two")[:5])
    exchange.feed(chunk(b"two")[5:] + chunk(b"three"))
    await asyncio.sleep(0)

    assert (b"".join(sink.got), task.done()) == (b"onetwothree", False)
    exchange.feed(chunk(b"last") + b"0\r\n\r\n")
    assert await task == b"last"
    assert (exchange.ended, len(sink.got)) == (True, 3)


async def test_a_closed_outlet_leaves_the_bytes_to_who_waits_and_none_overtakes_them() -> None:
    """What comes while the task is yet to run stays behind what woke it, and is bounded as ever."""
    sink = Sink(is_open=False)
    exchange, task = await reading(sink)

    exchange.feed(chunk(b"one"))
    sink.is_open = True
    exchange.feed(chunk(b"x" * MAX_WAITING_BYTES))

    assert sink.got == []
    assert await task == b"one" + b"x" * MAX_WAITING_BYTES
    exchange.abandon()


@dataclass
class Paused(asyncio.Transport):
    """A connection's transport that tells whether it reads."""

    socket: socket.socket
    is_reading_now: bool = True

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self.socket if name == "socket" else default

    def write(self, data: object) -> None:
        pass

    def pause_reading(self) -> None:
        self.is_reading_now = False

    def resume_reading(self) -> None:
        self.is_reading_now = True

    def abort(self) -> None:
        pass


@pytest.mark.parametrize("unit", [b"x" * 1000, b"\n"], ids=["large chunks", "tiny chunks"])
async def test_after_a_large_read_others_have_their_turn(unit: bytes) -> None:
    """While a read fills its buffer uvloop reads on, 8 MB in one turn of the loop; a task goes on with the next."""
    sink, connection = Sink(), Connection(lambda _: None)
    with socket.socket() as pretended:
        wire = Paused(pretended)
        connection.connection_made(wire)
    exchange = connection.begin(b"", Deadlines(5, 5, 5, 5))
    connection.data_received(HEAD)
    task = asyncio.get_running_loop().create_task(exchange.read(sink))
    await asyncio.sleep(0)
    count = MAX_WAITING_BYTES // len(chunk(unit)) + 1

    connection.data_received(chunk(unit) * count)

    assert (sink.got, wire.is_reading_now) == ([], False)
    assert await task == unit * count
    assert wire.is_reading_now
    exchange.abandon()


async def test_a_read_that_was_cancelled_passes_nothing_on() -> None:
    """Nobody waits any more, so the bytes do."""
    sink = Sink()
    exchange, task = await reading(sink)

    task.cancel()
    exchange.feed(chunk(b"one"))
    await asyncio.wait({task})

    assert (task.cancelled(), sink.got) == (True, [])
    assert await exchange.read() == b"one"
    exchange.abandon()


@pytest.mark.parametrize("fault", [BudgetSpentMidway(), ValueError("of the form")])
async def test_what_an_outlet_raises_ends_the_exchange_and_is_raised_where_it_is_waited(fault: Exception) -> None:
    """It does not get lost in the event loop, and nothing more is passed on."""
    sink = Sink(fault=fault)
    exchange, task = await reading(sink)

    exchange.feed(chunk(b"one"))

    with pytest.raises(type(fault)):
        await task
    assert sink.got == [b"one"]
    assert not exchange.ended
