"""What becomes of a run, its lease and its exchange when something ends it: stepped through, at every await."""

import asyncio
import json
import tracemalloc
from dataclasses import dataclass
from typing import Any

import pytest

from proxy.ends import End
from proxy.errors import BudgetSpentMidway, ClientLeft
from proxy.model import Deadlines, FlowRules, UpstreamRequest
from proxy.negotiation import Wish
from proxy.outages import PoolExhausted, RunDeadline, UpstreamCut, UpstreamProblem
from proxy.relay import Relay
from proxy.runs import STOPS_AT_ONCE, Run, Runs
from tests.support.asgi import RULES, STOP, Client, FakeExchange, FakeLease, FakeUpstream, end_of, run_of
from tests.support.events import parse_events

REQUEST = UpstreamRequest(b"POST", b"/", (), b"")
PATIENT = Deadlines(5, 5, 5, 5)
LINE = b'{"event":"message"}\n'
JSON = [(b"content-type", b"application/json")]


async def pause() -> None:
    """Let the loop turn once."""
    await asyncio.sleep(0)


class Stoppable(FakeUpstream):
    """Gives its exchange to the run, and a short answer to whoever asks it to stop."""

    async def start(self, request: UpstreamRequest, deadlines: Deadlines) -> FakeExchange:
        if request is STOP:
            self.requests.append(request)
            await pause()
            return FakeExchange([b"{}"], headers=JSON)
        given = await super().start(request, deadlines)
        self.has_given = True
        return given

    has_given = False


class Course:
    """One run on its way."""

    def __init__(self, wish: Wish | None, exchange: FakeExchange, rules: FlowRules = RULES, seconds: float = 5) -> None:
        self.client, self.exchange, self.lease = Client(), exchange, FakeLease()
        self.run: Run = run_of(wish, self.lease)
        self.upstream = Stoppable(exchange, before=pause)
        self.runs = Runs(self.upstream, rules)
        relay = Relay(self.upstream, self.runs, rules)
        deadlines = Deadlines(5, 5, 5, seconds)
        self.task = asyncio.ensure_future(
            relay.relay(REQUEST, deadlines, self.lease, self.client.receive, self.client.send, run=self.run)
        )

    @property
    def stops(self) -> int:
        """How often the sidecar was asked to stop the run."""
        return self.upstream.requests.count(STOP)

    async def settle(self) -> None:
        """Let everything that is under way come to rest."""
        for _ in range(30):
            await pause()

    async def is_quiet(self) -> bool:
        """Say whether no heart beats any more."""
        self.exchange.nudged.clear()
        await self.settle()
        return not self.exchange.nudged.is_set()


def stream(*more: Any) -> FakeExchange:
    """Make a stream of three lines, with a turn of the loop before each."""
    return FakeExchange([pause, LINE, pause, LINE, pause, LINE, *more], before=pause)


BEATING = FlowRules(1e-9, 1000, "safe", stop_on_disconnect=False, stop_over_budget=True)
"""A heart that beats at every turn of the loop."""
OWN = b'data: {"type":"TEXT_MESSAGE_CONTENT","delta":"w"}\n\n'


@dataclass(frozen=True)
class Way:
    """How a run goes; an empty part is a nudge."""

    wish: Wish | None
    parts: tuple[Any, ...] = (pause, LINE, pause, LINE, pause, LINE, pause)
    rules: FlowRules = RULES
    early: int = 0

    def course(self) -> Course:
        """Set out."""
        return Course(self.wish, FakeExchange([*self.parts], before=pause, early=self.early), self.rules)


WAYS = {
    "as it is": Way(Wish.AS_IT_IS),
    "lines": Way(Wish.LINES),
    "events": Way(Wish.EVENTS),
    "an invoke": Way(None),
    "beating": Way(Wish.EVENTS, (pause, b"", LINE, pause, b"", pause, LINE, b"", pause), BEATING),
    "pinged before the head": Way(Wish.EVENTS, (pause, b"", LINE, pause), BEATING, early=2),
    "events already": Way(Wish.EVENTS, (pause, b"da", pause, b"", OWN[2:], pause, b"", pause, OWN, pause), BEATING, 1),
    "ag-ui": Way(Wish.AG_UI, (pause, OWN, pause, OWN[:9], pause, OWN[9:], pause)),
}


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("way", WAYS)
async def test_a_shutdown_at_any_await_leaves_nothing_behind(way: str, steps: int) -> None:
    """Cancelled at every await: it stays a cancellation, the lease is free, upstream is closed or was whole."""
    before = asyncio.all_tasks()
    wish, course = WAYS[way].wish, WAYS[way].course()
    for _ in range(steps):
        await pause()
    was_done = course.task.done()
    course.task.cancel()
    if not was_done:
        with pytest.raises(asyncio.CancelledError):
            await course.task
    await course.settle()

    assert course.lease.released
    assert course.exchange.abandoned is not None or not course.upstream.has_given
    assert course.runs.pending == 0
    assert asyncio.all_tasks() == before
    is_told = bool(course.client.sent) and wish is Wish.EVENTS and OWN not in course.client.body
    assert course.client.is_complete == (was_done or is_told)
    assert await course.is_quiet()


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_leaves_at_any_await_leaves_nothing_behind(way: str, steps: int) -> None:
    """The lease is given back once, and only when upstream is over; an invoke is asked to stop."""
    before = asyncio.all_tasks()
    wish, course = WAYS[way].wish, WAYS[way].course()
    for _ in range(steps):
        await pause()
    went_on = course.upstream.has_given and not course.exchange.ended
    course.client.left.set()
    (outcome,) = await asyncio.gather(course.task, return_exceptions=True)
    await course.settle()

    assert isinstance(outcome, ClientLeft | None)
    assert course.lease.released
    assert course.runs.pending == 0
    assert asyncio.all_tasks() == before
    assert course.exchange.abandoned is not None or not course.upstream.has_given
    assert course.stops == (1 if wish is None and went_on and isinstance(outcome, ClientLeft) else 0)
    assert await course.is_quiet()


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_has_its_own_end_when_nothing_happens(way: str) -> None:
    """What is stepped through above is whole when it is let go on."""
    course = WAYS[way].course()
    await course.task

    assert course.client.is_complete
    assert course.client.body.count(OWN) == b"".join(part for part in WAYS[way].parts if part is not pause).count(OWN)
    assert await course.is_quiet()


async def test_an_invoke_that_was_left_keeps_its_place_until_upstream_ends() -> None:
    """Closed, it would go on and cost money unseen: it is asked to stop, read on, and its tokens are charged."""
    gate = asyncio.Event()
    usages = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    body = json.dumps({"data": {"messages": [{"role": "assistant", "content": [], "usages": usages}]}}).encode()
    course = Course(None, FakeExchange([gate.wait, body], headers=JSON))
    await course.settle()
    course.client.left.set()
    with pytest.raises(ClientLeft):
        await course.task
    await course.settle()

    assert (course.stops, course.lease.released, course.exchange.abandoned) == (1, 0, None)

    gate.set()
    await course.settle()

    assert course.lease.released == 1
    assert course.exchange.ended
    assert course.lease.tokens == (1 << 60) - 7


async def test_an_invoke_that_was_left_is_given_up_at_its_deadline() -> None:
    """A sidecar that neither stops nor ends does not hold a place for ever."""
    course = Course(None, FakeExchange([asyncio.Event().wait], headers=JSON), seconds=0.05)
    await course.settle()
    course.client.left.set()
    with pytest.raises(ClientLeft):
        await course.task
    while not course.lease.released:
        await asyncio.sleep(0.005)

    assert course.exchange.abandoned is not None


@pytest.mark.parametrize("asked", [True, False])
async def test_a_stream_that_was_left_is_stopped_too_where_that_is_set(asked: bool) -> None:
    """Its connection is closed either way."""
    rules = FlowRules(0, 1000, "safe", stop_on_disconnect=asked, stop_over_budget=True)
    course = Course(Wish.AS_IT_IS, stream(asyncio.Event().wait), rules)
    await course.settle()
    course.client.left.set()
    with pytest.raises(ClientLeft):
        await course.task
    await course.settle()

    assert course.stops == int(asked)
    assert course.exchange.abandoned is not None
    assert course.lease.released


async def test_an_invoke_over_its_deadline_is_stopped() -> None:
    """Nobody would hear its answer."""
    course = Course(None, FakeExchange([asyncio.Event().wait], headers=JSON), seconds=0.02)
    with pytest.raises(RunDeadline):
        await course.task
    await course.settle()

    assert course.stops == 1
    assert course.lease.released


async def test_what_is_kept_is_given_up_at_the_end_of_the_process() -> None:
    """Closing waits for stops that are on their way, not for runs."""
    course = Course(None, FakeExchange([asyncio.Event().wait], headers=JSON))
    await course.settle()
    course.client.left.set()
    with pytest.raises(ClientLeft):
        await course.task

    await course.runs.close(0.2)

    assert course.lease.released
    assert course.stops == 1
    assert course.runs.pending == 0


class Stops(FakeUpstream):
    """Answers what stops a run when it is told to; counts how much of it is under way."""

    def __init__(self) -> None:
        super().__init__(FakeExchange([]))
        self.go, self.under_way, self.most = asyncio.Event(), 0, 0

    async def start(self, request: UpstreamRequest, deadlines: Deadlines) -> FakeExchange:
        self.requests.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        async def answered() -> None:
            await self.go.wait()
            self.under_way -= 1

        return FakeExchange([b"{}"], headers=JSON, before=answered)


async def test_a_crowd_that_leaves_has_every_run_stopped_some_at_a_time() -> None:
    """Those for which there is no place yet are not dropped."""
    stops = Stops()
    runs = Runs(stops, RULES)
    for _ in range(STOPS_AT_ONCE + 20):
        runs.stop(run_of())
    for _ in range(10):
        await pause()
    first = len(stops.requests)
    stops.go.set()
    while runs.pending:
        await pause()

    assert (first, stops.most, len(stops.requests)) == (STOPS_AT_ONCE, STOPS_AT_ONCE, STOPS_AT_ONCE + 20)


@pytest.mark.parametrize(
    ("exchange", "told"),
    [
        (FakeExchange([b"{}"], headers=JSON), (200, "answered")),
        (PoolExhausted(), (0, "overloaded")),
        (UpstreamProblem(reason="ConnectionRefusedError"), (0, "ConnectionRefusedError")),
        (FakeExchange([UpstreamCut(reason="end of file")]), (200, "end of file")),
        (FakeExchange([asyncio.Event().wait]), (200, "shutdown")),
    ],
)
async def test_what_became_of_asking_is_told(
    exchange: FakeExchange | Exception, told: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    """The line has the sidecar's status, if there was one, and always a reason; also where the process ended first."""
    runs = Runs(FakeUpstream(exchange), RULES)
    with caplog.at_level("INFO", "agentflow_proxy.runs"):
        runs.stop(run_of())
        await runs.close(0.02)
    (fields,) = [record.__dict__["fields"] for record in caplog.records if record.message == "run.stop_sent"]

    assert (fields["status"], fields["reason"]) == told


@pytest.mark.parametrize("wish", [Wish.AS_IT_IS, Wish.EVENTS])
async def test_a_spent_budget_ends_a_stream(wish: Wish) -> None:
    """What came is passed on, the sidecar is told to stop, and a client of events hears why."""
    answer = b'{"event":"message","message":{"message_id":"m","role":"assistant","content":[],"usages":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}}\n'  # noqa: E501  one line
    course = Course(wish, FakeExchange([LINE, answer, asyncio.Event().wait]))
    course.lease.tokens = 10
    with pytest.raises(BudgetSpentMidway):
        await course.task
    await course.settle()

    assert course.stops == 1
    assert course.lease.released
    assert b'"total_tokens":10' in course.client.body
    assert course.client.is_complete == (wish is Wish.EVENTS)
    if wish is Wish.EVENTS:
        last = parse_events(course.client.body)[-1]
        assert (last.name, json.loads(last.data)["end"]) == ("stopped", "budget_spent")


async def test_a_budget_may_be_overspent_where_that_is_set() -> None:
    """The stream goes on to its end; the tokens are charged all the same."""
    answer = b'{"event":"message","message":{"message_id":"m","role":"assistant","content":[],"usages":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}}\n'  # noqa: E501  one line
    rules = FlowRules(0, 1000, "safe", stop_on_disconnect=False, stop_over_budget=False)
    course = Course(Wish.EVENTS, FakeExchange([answer, LINE]), rules)
    course.lease.tokens = 10
    await course.task

    assert parse_events(course.client.body)[-1].name == "done"
    assert course.lease.tokens == 0


@pytest.mark.parametrize("wish", [Wish.AS_IT_IS, Wish.EVENTS, None])
async def test_a_client_that_does_not_read_holds_nothing_at_the_end(wish: Wish | None) -> None:
    """Last words are not waited for: at its deadline the exchange and the lease are free."""
    course = Course(wish, stream(), seconds=0.05)
    course.client.block = asyncio.Event()
    with pytest.raises(RunDeadline):
        await course.task

    assert course.exchange.abandoned is not None
    assert course.lease.released
    assert not course.client.is_complete


async def test_a_cut_is_told_as_an_event_and_nothing_follows() -> None:
    """The body ends well, so that no library takes the told end for a broken connection."""
    course = Course(Wish.EVENTS, stream(UpstreamCut()))
    with pytest.raises(UpstreamCut):
        await course.task

    assert course.client.is_complete
    assert [event.name for event in parse_events(course.client.body)] == ["message"] * 3 + ["error"]


async def test_a_run_that_ended_is_not_known_any_more() -> None:
    """A stop that comes later concerns nobody."""
    course = Course(Wish.EVENTS, stream())
    await course.task
    course.runs.note_stop(course.run.thread_id)

    assert not course.run.stop_asked
    assert end_of(course.run) is End.DONE


@pytest.mark.parametrize("wish", [Wish.AS_IT_IS, Wish.LINES, Wish.EVENTS])
async def test_blanks_before_the_first_line_are_not_held(wish: Wish) -> None:
    """Neither the form of a stream nor its label is waited for without end: 16 MiB of blanks take no memory."""
    course = Course(wish, FakeExchange([*[b"\n" * 65_536] * 256, LINE]))
    course.client.keeps = False
    tracemalloc.start()
    try:
        await course.task
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4 << 20
    assert course.client.is_complete


@pytest.mark.parametrize("wish", [Wish.AS_IT_IS, Wish.LINES, Wish.EVENTS, Wish.AG_UI])
async def test_a_stream_is_the_last_on_its_connection_and_keeps_no_fields(wish: Wish) -> None:
    """A drain that begins while it is open can tell no more that the connection closes; nor is its length kept."""
    exchange = stream()
    exchange.headers.append((b"content-length", b"60"))
    course = Course(wish, exchange)
    await course.task

    head = course.client.sent[0]["headers"]
    assert [value for name, value in head if name == b"connection"] == [b"close"]
    assert [name for name, _ in head if name == b"content-length"] == []
    assert exchange.headers == []
