"""What the task of a connection waits for, in less memory than asyncio's own: for there are thousands of open streams.

Knows neither requests nor answers.
"""

import asyncio
from typing import cast

from uvicorn.protocols.http.flow_control import FlowControl


class Signal:
    """An `asyncio.Event` for one task that waits. That one's deque takes 760 bytes of every open stream."""

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Let the task go on, now or when it comes to wait."""
        self._is_set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        """Have it wait again."""
        self._is_set = False

    async def wait(self) -> None:
        """Wait until it is set."""
        if not self._is_set:
            assert self._waiter is None or self._waiter.done()  # noqa: S101  a second one would never be told
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


class Flow(FlowControl):
    """uvicorn's flow control, with a `Signal`."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = self.write_paused = False
        self._is_writable_event = cast("asyncio.Event", Signal())
        self._is_writable_event.set()
