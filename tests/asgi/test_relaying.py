"""The relay between a client and an upstream that a test steps through.

Order, ends and cancellation; what sockets do is shown in tests/integration.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from proxy.errors import BodyTimeout, BodyTooLarge, BodyUnsupported, ClientLeft
from proxy.model import Deadlines, Inbox, UpstreamRequest
from proxy.outages import RunDeadline, UpstreamCut, UpstreamMalformed
from proxy.relay import MAX_COLLECTED_BYTES, Relay, read_body
from proxy.runs import Runs
from tests.support.asgi import RULES, Client, FakeExchange, FakeLease, FakeUpstream

REQUEST = UpstreamRequest(b"POST", b"/", (), b"")
PATIENT = Deadlines(5, 5, 5, 5)
JSON = [(b"content-type", b"application/json")]


async def never() -> None:
    """Wait for ever."""
    await asyncio.Event().wait()


def relaying(client: Client, upstream: FakeUpstream, deadlines: Deadlines = PATIENT) -> asyncio.Future[None]:
    """Start relaying one answer."""
    return asyncio.ensure_future(relay_to(upstream).relay(REQUEST, deadlines, FakeLease(), client.receive, client.send))


def relay_to(upstream: FakeUpstream) -> Relay:
    """Make the relay."""
    return Relay(upstream, Runs(upstream, RULES), RULES)


async def test_each_read_becomes_one_send_in_order() -> None:
    """The parts arrive as they were read, none merged and none split, and then the end."""
    client, exchange = Client(), FakeExchange([b"a", b"bb", b"\x00\xff"])

    await relaying(client, FakeUpstream(exchange))

    assert [message.get("body") for message in client.sent[1:]] == [b"a", b"bb", b"\x00\xff", b""]
    assert [message.get("more_body") for message in client.sent[1:]] == [True, True, True, False]


async def test_the_head_goes_out_before_the_body_comes() -> None:
    """Status and headers reach the client while upstream has not written a byte of body."""
    client, gate = Client(), asyncio.Event()
    running = relaying(client, FakeUpstream(FakeExchange([gate.wait, b"late"], status=201)))
    while not client.sent:
        await asyncio.sleep(0)

    start = dict(client.sent[0])
    gate.set()
    await running

    assert start["type"] == "http.response.start"
    assert start["status"] == 201
    assert client.body == b"late"


async def test_a_cut_answer_is_never_ended() -> None:
    """After upstream's cut, what came is sent and the end is not."""
    client, exchange = Client(), FakeExchange([b"part", UpstreamCut()])

    with pytest.raises(UpstreamCut):
        await relaying(client, FakeUpstream(exchange))

    assert client.body == b"part"
    assert not client.is_complete


@pytest.mark.parametrize("waiting_for", ["head", "body", "client"])
async def test_a_client_that_leaves_ends_the_exchange_wherever_it_waits(waiting_for: str) -> None:
    """Leaving while the head, the body or the client's own reading is waited for abandons upstream."""
    client = Client()
    exchange = FakeExchange([b"part", never if waiting_for == "body" else b"more"])
    upstream = FakeUpstream(exchange, before=never if waiting_for == "head" else None)
    client.block = asyncio.Event() if waiting_for == "client" else None
    running = relaying(client, upstream)
    for _ in range(10):
        await asyncio.sleep(0)

    client.left.set()
    with pytest.raises(ClientLeft):
        await running

    assert not client.is_complete
    assert (exchange.abandoned is None) == (waiting_for == "head")


@pytest.mark.parametrize("waiting_for", ["head", "body", "client"])
async def test_the_total_deadline_ends_the_exchange_wherever_it_waits(waiting_for: str) -> None:
    """Time is up also for a client that does not read."""
    client = Client()
    exchange = FakeExchange([b"part", never if waiting_for == "body" else b"more"])
    upstream = FakeUpstream(exchange, before=never if waiting_for == "head" else None)
    client.block = asyncio.Event() if waiting_for == "client" else None

    with pytest.raises(RunDeadline):
        await relaying(client, upstream, Deadlines(5, 5, 5, 0.02))

    assert not client.is_complete


@pytest.mark.parametrize("steps", range(12))
async def test_cancellation_at_any_step_abandons_upstream_and_stays_a_cancellation(steps: int) -> None:
    """A shutdown may cancel at every await; none swallows it, and none leaves the exchange open."""

    async def pause() -> None:
        await asyncio.sleep(0)

    client, exchange = Client(), FakeExchange([pause, b"a", pause, b"b", pause, b"c", pause])
    begun: list[bool] = []

    async def begin() -> None:
        await asyncio.sleep(0)
        begun.append(True)

    before = asyncio.all_tasks()
    running = relaying(client, FakeUpstream(exchange, before=begin))
    for _ in range(steps):
        await asyncio.sleep(0)
    was_done = running.done()
    running.cancel()
    if was_done:
        await running
    else:
        with pytest.raises(asyncio.CancelledError):
            await running

    assert client.is_complete == was_done
    assert (exchange.abandoned is not None) == bool(begun)
    await asyncio.sleep(0)  # the watcher's own cancellation
    assert asyncio.all_tasks() == before


async def test_a_client_leaving_as_the_answer_ends_leaves_no_cancellation_behind() -> None:
    """The watcher's cancellation does not reach what the task does next."""
    client = Client()

    async def leave() -> None:
        client.left.set()
        for _ in range(5):
            await asyncio.sleep(0)

    async def both() -> str:
        relay = relay_to(FakeUpstream(FakeExchange([b"a", leave])))
        with contextlib.suppress(ClientLeft):
            await relay.relay(REQUEST, PATIENT, FakeLease(), client.receive, client.send)
        await asyncio.sleep(0)
        return "went on"

    assert await asyncio.ensure_future(both()) == "went on"


class Told(Inbox):
    """The inbox of a client, all of whose body has come; it tells of its leaving when `left` is called."""

    def __init__(self, body: bytes | None) -> None:
        self.body = body
        self.left: Callable[[], None] | None = None

    def take_body(self) -> bytes | None:
        return self.body

    def on_leave(self, left: Callable[[], None] | None) -> None:
        self.left = left


@pytest.mark.parametrize("waiting_for", ["head", "body", "client"])
async def test_an_inbox_tells_of_the_clients_leaving_without_a_task(waiting_for: str) -> None:
    """What a watching task does without one: upstream is abandoned wherever the relay waits."""
    client, inbox = Client(), Told(b"")
    exchange = FakeExchange([b"part", never if waiting_for == "body" else b"more"])
    upstream = FakeUpstream(exchange, before=never if waiting_for == "head" else None)
    client.block = asyncio.Event() if waiting_for == "client" else None
    before = asyncio.all_tasks()
    running = asyncio.ensure_future(relay_to(upstream).relay(REQUEST, PATIENT, FakeLease(), inbox, client.send))
    for _ in range(10):
        await asyncio.sleep(0)

    assert asyncio.all_tasks() - before == {running}
    assert inbox.left is not None
    inbox.left()
    with pytest.raises(ClientLeft):
        await running

    assert not client.is_complete
    assert inbox.left is None
    assert (exchange.abandoned is None) == (waiting_for == "head")


async def test_a_body_that_has_come_is_taken_at_once_and_bounded_too() -> None:
    """Nothing is received of it, and it is no longer than any other."""
    assert await read_body(JSON, Told(b"x" * 100), most=100, seconds=5) == b"x" * 100
    with pytest.raises(BodyTooLarge):
        await read_body(JSON, Told(b"x" * 101), most=100, seconds=5)


async def test_a_collected_answer_is_bounded() -> None:
    """An answer that is gathered whole cannot fill memory."""
    parts: list[Any] = [b"x" * (1 << 20)] * 17
    exchange = FakeExchange(parts)

    with pytest.raises(UpstreamMalformed):
        await relay_to(FakeUpstream(exchange)).collect(REQUEST, PATIENT, Client().receive)

    assert len(parts) * (1 << 20) < MAX_COLLECTED_BYTES
    assert exchange.abandoned is not None


def body_messages(*parts: bytes) -> list[dict[str, Any]]:
    """Write a request body as ASGI messages."""
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": at < last} for at, part in enumerate(parts)]


@pytest.mark.parametrize("parts", [(b"{}",), (b"", b"{", b"}", b""), (b"x" * 50, b"x" * 50)])
async def test_a_body_is_read_whole(parts: tuple[bytes, ...]) -> None:
    """However it is cut up, up to exactly the limit."""
    client = Client(body_messages(*parts))

    body = await read_body(JSON, client.receive, most=100, seconds=5)

    assert body == b"".join(parts)


@pytest.mark.parametrize("parts", [(b"x" * 101,), (b"x" * 60, b"x" * 60, b"never read")])
async def test_a_body_over_the_limit_is_refused_before_the_rest_is_read(parts: tuple[bytes, ...]) -> None:
    """The first part over the limit ends it."""
    client = Client(body_messages(*parts))

    with pytest.raises(BodyTooLarge):
        await read_body(JSON, client.receive, most=100, seconds=5)

    assert len(client.incoming) == len(parts) - min(2, len(parts))


async def test_an_announced_length_over_the_limit_is_refused_unread() -> None:
    """Nothing is read of a body that says it is too long."""
    client = Client(body_messages(b"{}"))

    with pytest.raises(BodyTooLarge):
        await read_body([*JSON, (b"content-length", b"101")], client.receive, most=100, seconds=5)

    assert len(client.incoming) == 1


async def test_a_body_that_does_not_come_is_timed_out() -> None:
    """The time is for the whole body."""
    client = Client([{"type": "http.request", "body": b"{", "more_body": True}])

    with pytest.raises(BodyTimeout):
        await read_body(JSON, client.receive, most=100, seconds=0.02)


async def test_a_client_that_leaves_midway_is_noticed() -> None:
    """Half a body is no body."""
    client = Client([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    with pytest.raises(ClientLeft):
        await read_body(JSON, client.receive, most=100, seconds=5)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-type", b"text/plain")],
        [(b"content-type", b"application/x-www-form-urlencoded")],
        [(b"content-type", b"application/foo+json")],
        [(b"content-type", b"application/json; charset=utf-16")],
        [*JSON, (b"content-encoding", b"gzip")],
        [*JSON, (b"content-type", b"text/html")],
    ],
)
async def test_only_plain_json_is_read(headers: list[tuple[bytes, bytes]]) -> None:
    """Other media types, charsets and codings are refused with the body unread."""
    client = Client(body_messages(b"{}"))

    with pytest.raises(BodyUnsupported):
        await read_body(headers, client.receive, most=100, seconds=5)

    assert len(client.incoming) == 1


@pytest.mark.parametrize(
    "value", [b"application/json", b"Application/JSON; charset=UTF-8", b'application/json;charset="utf-8"']
)
async def test_json_is_recognised_as_people_write_it(value: bytes) -> None:
    """Case, spaces and quotes make no difference."""
    client = Client(body_messages(b"{}"))

    assert await read_body([(b"content-type", value)], client.receive, most=100, seconds=5) == b"{}"
