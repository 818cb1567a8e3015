"""What serves no request, from before the first of them until after the last: its beginning, and its end in time.

Only wiring; knows neither requests nor signals.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from proxy.admission import Limits
from proxy.keycache import KeyCache
from proxy.model import Lifecycle
from proxy.overload import Overload
from proxy.runs import Runs
from proxy.settings import Settings
from proxy.telemetry import Telemetry

if TYPE_CHECKING:
    from proxy.keystore import SqlKeyStore


@asynccontextmanager
async def background(
    settings: Settings,
    lifecycle: Lifecycle,
    keys: KeyCache,
    store: "SqlKeyStore | None",
    limits: Limits,
    overload: Overload,
    runs: Runs,
    telemetry: Telemetry,
) -> AsyncGenerator[None]:
    """Run what serves no request: the server enters this before it listens, and leaves it last.

    Each part ends in what is then left of the lifecycle; who cannot end, because somebody does not answer, is cut off.
    """

    def left() -> float:
        return lifecycle.left(asyncio.get_running_loop().time())

    def ending(part: AbstractAsyncContextManager[None]) -> AbstractAsyncContextManager[None]:
        return _ending_within(left, part)

    async with (
        ending(_closing(store)),
        telemetry.watching(left),
        overload.watching(),
        ending(keys.watching()),
        ending(nullcontext() if store is None else _listening(settings, keys)),
        ending(limits.watching()),
    ):
        try:
            yield
        finally:  # before the limits end, which are told what the last runs used and held: they need time too
            await runs.close(left() / 2)


@asynccontextmanager
async def _ending_within(left: Callable[[], float], part: AbstractAsyncContextManager[None]) -> AsyncGenerator[None]:
    """Enter `part`; its own end may take as long as `left` says when it begins."""
    end = AsyncExitStack()
    await end.enter_async_context(part)
    try:
        yield
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(left()):
                await end.aclose()


@asynccontextmanager
async def _closing(store: "SqlKeyStore | None") -> AsyncGenerator[None]:
    try:
        yield
    finally:
        if store is not None:
            await store.close()


def _listening(settings: Settings, keys: KeyCache) -> AbstractAsyncContextManager[None]:
    """Hear of changed keys at once where there is Redis to hear it from."""
    if settings.redis_url is None:
        return nullcontext()
    from proxy.notices import Notices  # noqa: PLC0415  what is not asked for is not imported

    return Notices(settings.redis_url.get_secret_value(), prefix=settings.redis_prefix).listening(keys.look_again)
