"""Two ends that talk: one client and one sidecar on a WebSocket each, until either closes or time is up.

Knows no caller and no rule: what the client says is admitted, or refused, by a function that it is given.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close

from proxy.ends import End
from proxy.errors import BudgetSpentMidway, ClientLeft, ClientProblem, Problem
from proxy.frames import ends_a_run, error_frame, is_error
from proxy.framing import ErrorLines
from proxy.model import DRAIN, Lease, Receive, Record, Send, UpstreamRequest, Usage
from proxy.negotiation import Wish
from proxy.outages import Draining, ReducedCapacity, RunDeadline, UpstreamCut, UpstreamMalformed
from proxy.overload import Overload
from proxy.runs import Run, Runs, Spending
from proxy.usage import reader_for

GOING_AWAY: Final = 1001
IDLE: Final = "idle"
"""The reason of a close for silence."""
_NORMAL: Final = 1000
_NO_CODE: Final = 1005
"""Stands for a close that had none, and is never on the wire itself (RFC 6455 §7.4.1)."""
_OVER_UPSTREAM: Final = frozenset({End.UPSTREAM_CUT, End.UPSTREAM_MALFORMED})
"""Ends after which nothing goes on at the sidecar."""
MOST_TURNS: Final = 16
"""Runs that one conversation may have asked for: the sidecar runs one after the other, and the rest waits."""
_REFUSALS_THAT_END: Final = frozenset({401, 403})


class Turn:
    """One run of a conversation: what it spends, and the place it holds. Begins when it is made, ends once."""

    def __init__(
        self,
        lease: Lease,
        record: Record,
        runs: Runs,
        overload: Overload,
        *,
        thread_id: str,
        stop: Callable[[], UpstreamRequest],
    ) -> None:
        self._lease = lease
        self._record = record
        self._runs = runs
        self._overload = overload
        self._own = replace(record, usage=None, turns=0)
        self.spending = Spending(reader_for("stream"), lease, self._own)
        self._run = Run(record, thread_id, stop, Wish.AS_IT_IS, self.spending)
        runs.begin(self._run)
        overload.open_runs += 1
        record.running += 1

    def stop(self) -> None:
        """Ask the sidecar to stop it: left alone it goes on until it has something to say."""
        self._runs.stop(self._run)

    def end(self, end: End) -> None:
        """Give the place back, charge the rest, and add what it has used to what the conversation has."""
        self._overload.open_runs -= 1
        self._runs.end(self._run)
        self._lease.release()
        self.spending.settle()
        if self._run.stop_asked and end is End.DONE:
            end = End.STOPPED
        record = self._record
        record.running -= 1
        record.run_ends = ends = record.run_ends or {}
        ends[end] = ends.get(end, 0) + 1
        record.turns += self._own.turns
        if (used := self._own.usage) is not None:
            record.usage = used if record.usage is None else _sum_of(record.usage, used)


@dataclass(slots=True)
class Conversation:
    """One client and one sidecar that talk; `admit` binds what the client says, or raises a Problem."""

    upstream: ClientConnection
    receive: Receive
    send: Send
    admit: Callable[[bytes], Awaitable[tuple[bytes, "Turn"]]]
    stop_over_budget: bool
    errors: ErrorLines
    request_id: str
    _turns: deque["Turn"] = field(default_factory=deque)
    """The runs that were asked for and have not ended, the oldest first: the sidecar runs them one by one."""
    _goodbye: Close = field(default_factory=lambda: Close(GOING_AWAY, ""))
    """What the sidecar is told at the end: the client's own close, where there was one."""
    _draining: bool = False
    _active: float = 0.0

    async def until_closed(self, *, idle: float, total: float) -> Close:
        """Carry until one end closes; give the close that the client is to see. Raises a Problem."""
        loop = asyncio.get_running_loop()
        end = loop.time() + total
        self._active = loop.time()
        up, down = asyncio.create_task(self._up()), asyncio.create_task(self._down())
        why = End.UPSTREAM_CUT
        try:
            while True:
                due = min(end, self._active + idle)
                done, _ = await asyncio.wait((up, down), timeout=due - loop.time(), return_when=asyncio.FIRST_COMPLETED)
                if up in done:  # which says why, also where the sidecar has closed as well
                    why = End.CLIENT_LEFT
                    return up.result()
                if done:
                    return down.result()
                if loop.time() >= end:
                    raise RunDeadline
                if loop.time() >= self._active + idle:
                    why = End.IDLE_DEADLINE
                    return Close(GOING_AWAY, IDLE)
        except Problem as problem:
            why = problem.end
            raise
        except asyncio.CancelledError:
            why = End.SHUTDOWN
            raise
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            if self._turns and why not in _OVER_UPSTREAM:  # the first alone has begun
                self._turns[0].stop()
            while self._turns:
                self._turns.popleft().end(why)
            await self._part()

    async def _up(self) -> Close:
        """Carry what the client says. Raises ClientLeft when it is gone, Draining when we are to end."""
        while True:
            message = await self.receive()
            if message["type"] == "websocket.disconnect":
                if "reason" not in message:  # it went without a word
                    raise ClientLeft
                code = message["code"]
                self._goodbye = Close(code if _can_be_told(code) else GOING_AWAY, message["reason"] or "")
                return self._goodbye
            if message["type"] == DRAIN:
                self._draining = True
                if not self._turns:
                    raise Draining
            else:
                await self._say(message)

    async def _say(self, message: Mapping[str, Any]) -> None:
        text = message.get("text")
        self._active = asyncio.get_running_loop().time()
        try:
            self._require_room()
            bound, turn = await self.admit(text.encode() if text is not None else message["bytes"])
        except (ClientProblem, ReducedCapacity) as problem:
            if problem.status in _REFUSALS_THAT_END:
                raise
            await self.send({"type": "websocket.send", "text": error_frame(problem, request_id=self.request_id)})
            return
        self._turns.append(turn)
        with contextlib.suppress(ConnectionClosed):  # the other task tells of it
            await self.upstream.send(bound.decode() if text is not None else bound)

    def _require_room(self) -> None:
        if self._draining:
            raise Draining
        if len(self._turns) >= MOST_TURNS:
            raise ReducedCapacity(f"At most {MOST_TURNS} runs may wait for one another.", reason="runs waiting")

    async def _down(self) -> Close:
        """Carry what the sidecar says; give its close. Raises Draining after a run when we are to end."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                said = await self.upstream.recv()
                if isinstance(said, str):
                    await self.send({"type": "websocket.send", "text": self._safe(said)})
                    self._account(said)
                else:
                    await self.send({"type": "websocket.send", "bytes": said})
                self._active = loop.time()
        except ConnectionClosed as error:
            return self._closed(error)
        except OSError as error:  # what uvicorn raises when the client is gone
            raise ClientLeft from error

    def _safe(self, said: str) -> str:
        """Give what the client may hear of an error; anything else as it is."""
        if '"error"' not in said:
            return said
        return self.errors.safe(said.encode())[0].decode() if is_error(said) else said

    def _account(self, said: str) -> None:
        """Charge what a run has used. Raises BudgetSpentMidway, or Draining after a run when we are to end."""
        if not self._turns:
            return
        turn = self._turns[0]
        in_budget = turn.spending.take(said.encode() + b"\n")
        if ('"done"' in said or '"error"' in said) and ends_a_run(said):
            self._turns.popleft().end(End.UPSTREAM_ERROR if is_error(said) else End.DONE)
            if self._draining and not self._turns:
                raise Draining
        elif not in_budget and self.stop_over_budget:
            raise BudgetSpentMidway

    def _closed(self, error: ConnectionClosed) -> Close:
        if error.rcvd is None:
            if error.sent is not None:
                raise UpstreamMalformed(reason=f"closed {error.sent.code}") from error
            raise UpstreamCut(reason="end of file") from error
        code = error.rcvd.code
        return Close(code if _can_be_told(code) else _NORMAL, error.rcvd.reason)

    async def _part(self) -> None:
        """Say goodbye to the sidecar, if nobody has; it does not wait for an answer longer than a second."""
        with contextlib.suppress(ConnectionClosed, OSError):
            await self.upstream.close(code_of(self._goodbye), self._goodbye.reason)  # type: ignore[arg-type]  # without a code, as its protocol can


def _sum_of(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.total_tokens + other.total_tokens,
        one.estimated or other.estimated,
    )


def code_of(close: Close) -> int | None:
    """Give the code that is to be written into a close, if any."""
    return close.code if close.code != _NO_CODE else None


def _can_be_told(code: int) -> bool:
    """Say whether a code may be written into a close, or stands for none (RFC 6455 §7.4, and the registry it opens)."""
    return 1000 <= code <= 1003 or code == _NO_CODE or 1007 <= code <= 1014 or 3000 <= code <= 4999  # noqa: PLR2004  the RFC's own ranges
