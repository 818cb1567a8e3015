"""What a connection's task waits for: told before or after, once for each wait, and one task at a time."""

import asyncio

import pytest

from proxy.signals import Flow, Signal
from tests.asgi.test_writing_answers import Wire


async def test_what_is_told_before_is_not_waited_for() -> None:
    """As with an event of asyncio's: it stays set until it is cleared."""
    signal = Signal()
    signal.set()

    await signal.wait()
    await signal.wait()


async def test_who_waits_goes_on_when_told() -> None:
    """And waits anew when it was cleared."""
    signal, went_on = Signal(), []

    async def wait() -> None:
        for number in range(2):
            await signal.wait()
            signal.clear()
            went_on.append(number)

    task = asyncio.create_task(wait())
    for told in (1, 2):
        await asyncio.sleep(0)
        signal.set()
        await asyncio.sleep(0)
        assert len(went_on) == told
    await task


async def test_a_second_task_cannot_wait_unheard() -> None:
    """There is room for one, so another fails at once; after a cancelled one there is room again."""
    signal = Signal()
    first = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)

    with pytest.raises(AssertionError):
        await signal.wait()

    first.cancel()
    await asyncio.wait({first})
    second = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    signal.set()
    await second


async def test_a_client_that_was_never_slow_is_not_waited_for() -> None:
    """Only a paused connection drains, and until it is written."""
    flow = Flow(Wire())
    await flow.drain()

    flow.pause_writing()
    waiting = asyncio.create_task(flow.drain())
    await asyncio.sleep(0)
    was_waiting = not waiting.done()
    flow.resume_writing()
    await waiting

    assert was_waiting
