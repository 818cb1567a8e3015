"""Tasks that go on beside something else, and end with it.

Knows nothing of what they do.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """Do `work` as long as the context lasts. Raises at its end what the work has raised before."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await end(task)


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they have ended. Raises what one of them has raised."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)  # to await one itself would take its cancellation and ours for the same
    for task in tasks:
        if not task.cancelled():
            task.result()
