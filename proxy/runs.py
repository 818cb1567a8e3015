"""The runs that go on now, by thread; and what becomes of those whose client left.

A run that its caller asked to stop is known here, as far as he asked this process. Never waits for a client.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Final

from proxy.errors import Problem
from proxy.model import Deadlines, Exchange, FlowRules, Lease, Record, Upstream, UpstreamRequest
from proxy.negotiation import Wish
from proxy.usage import UsageReader

log: Final = logging.getLogger("agentflow_proxy.runs")
STOPS_AT_ONCE: Final = 256
"""Requests to stop a run that are under way; the others wait for one of these to end."""
_STOP_SECONDS: Final = 30.0
"""For one to be answered, its waiting included."""
_CHARGED_EACH_BYTES: Final = 8192


class Spending:
    """Reads what a run has used from its answer, and charges it to the run's lease as it becomes known."""

    def __init__(self, reader: UsageReader, lease: Lease, record: Record) -> None:
        self._reader = reader
        self._lease = lease
        self._record = record
        self._unread = 0
        self._turns = 0
        self._charged = 0

    def take(self, data: bytes) -> bool:
        """Take in bytes of a stream; False when what is known by now is more than the budget has."""
        self._reader.feed(data)
        self._unread += len(data)
        if self._unread < _CHARGED_EACH_BYTES and self._reader.turns == self._turns:
            return True
        return self.settle()

    def note(self, data: bytes) -> None:
        """Take in bytes of an answer that is charged at its end."""
        self._reader.feed(data)

    def settle(self) -> bool:
        """Charge what is known, at the latest when the run is over; False when that is more than the budget has.

        What was estimated too high is given back when the sidecar has told.
        """
        self._unread = 0
        usage = self._reader.usage()
        self._turns = self._reader.turns
        if usage is None:
            return True
        self._record.usage = usage
        self._record.turns = self._turns
        tokens = usage.total_tokens - self._charged
        if not tokens:
            return True
        self._charged = usage.total_tokens
        return self._lease.charge(tokens, estimated=usage.estimated)


@dataclass(slots=True, eq=False)
class Run:
    """What the relay must know of a run, beside its request. `stop` makes the request that stops it."""

    record: Record
    thread_id: str
    stop: Callable[[], UpstreamRequest]
    wish: Wish | None
    """How its stream is written; None: it is no stream, and goes on upstream when its client has left."""
    spending: Spending
    stop_asked: bool = False


class Runs:
    """Runs that go on, whoever still listens to them. `note_end` is told when one has ended that was kept.

    `stops` is where the sidecar is asked to stop them, `STOPS_AT_ONCE` at most at a time. It shares no connection with
    the runs: when they have taken all there are, stopping one is what makes room.
    """

    def __init__(self, stops: Upstream, rules: FlowRules, note_end: Callable[[], None] = lambda: None) -> None:
        self._note_end = note_end
        self._stops = stops
        self._stop_places = asyncio.Semaphore(STOPS_AT_ONCE)
        self._rules = rules
        self._by_thread: dict[str, list[Run]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: dict[Run, Exchange] = {}

    def begin(self, run: Run) -> None:
        """Count a run in."""
        self._by_thread.setdefault(run.thread_id, []).append(run)

    def end(self, run: Run) -> None:
        """Count a run out."""
        others = self._by_thread[run.thread_id]
        others.remove(run)
        if not others:
            del self._by_thread[run.thread_id]

    def note_stop(self, thread_id: str) -> None:
        """Take in that the caller asks the runs of a thread to stop."""
        for run in self._by_thread.get(thread_id, ()):
            run.stop_asked = True

    def leave(self, run: Run, exchange: Exchange | None, lease: Lease, *, seconds: float) -> bool:
        """Take over a run whose client left; say whether its exchange and its lease are kept here.

        A stream's run ends with its connection, an invoke's does not: it is asked to stop, and until it ends, at
        most `seconds` from now, its exchange is read and its lease is held.
        """
        if exchange is None:
            return False
        keep = run.wish is None and not exchange.ended
        if keep:
            self._kept[run] = exchange
            run.record.goes_on = True
            self._go(self._keep(run, exchange, lease, seconds))
        if keep or (run.wish is not None and self._rules.stop_on_disconnect):
            self.stop(run)
        return keep

    def stop(self, run: Run) -> None:
        """Ask the sidecar to stop a run, as its own caller; nobody waits for the answer."""
        self._go(self._stop(run))

    @property
    def pending(self) -> int:
        """How many runs are kept, or being asked to stop."""
        return len(self._tasks)

    async def close(self, seconds: float) -> None:
        """Give up what is kept, and wait at most `seconds` for what is being asked to stop."""
        for exchange in list(self._kept.values()):
            exchange.abandon()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _go(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, run: Run, exchange: Exchange, lease: Lease, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await exchange.head()
                while not exchange.ended:
                    run.spending.note(await exchange.read())
        except (Problem, TimeoutError):
            pass  # nobody is left to be told
        finally:
            del self._kept[run]
            exchange.abandon()
            lease.release()
            run.spending.settle()
            run.record.goes_on = False
            self._note_end()

    async def _stop(self, run: Run) -> None:
        status, reason = 0, "failed"
        deadlines = Deadlines(_STOP_SECONDS, _STOP_SECONDS, _STOP_SECONDS, _STOP_SECONDS)
        try:
            async with asyncio.timeout(_STOP_SECONDS), self._stop_places:
                exchange = await self._stops.start(run.stop(), deadlines)
                try:
                    await exchange.head()
                    status = exchange.status
                    while not exchange.ended:
                        await exchange.read()
                finally:
                    exchange.abandon()
            reason = "answered"
        except (Problem, TimeoutError) as error:
            reason = error.reason or error.code if isinstance(error, Problem) else "timeout"
        except asyncio.CancelledError:
            reason = "shutdown"
            raise
        finally:
            fields = {"request_id": run.record.request_id.decode(), "status": status, "reason": reason}
            log.info("run.stop_sent", extra={"fields": fields})
