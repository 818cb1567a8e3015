"""Word between proxies that share Redis: something has changed, look again. Never what has changed.

A notice is empty and its content is never read: whoever forges one makes a proxy ask its own database, no oftener than
`keycache` allows. Without Redis nothing breaks, since every proxy looks by itself every few seconds (docs/adr/0012).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from proxy.redisclient import CONNECT_SECONDS, FAULTS, connect, reason_of
from proxy.tasks import beside

log: Final = logging.getLogger("agentflow_proxy.notices")
PING_SECONDS: Final = 10.0
"""A connection that is silent for this long is asked for a sign of life, and given up after as long again."""
FIRST_WAIT: Final = 0.1
LONGEST_WAIT: Final = 10.0


class Notices:
    """The channel of one deployment, named by the prefix that its keys in Redis have too."""

    def __init__(self, url: str, *, prefix: str) -> None:
        self._client = connect(url)
        self._channel = f"{prefix}:changes"
        self._down = False

    async def announce(self) -> str:
        """Tell every proxy to look again; give why that failed, nothing when it did not."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.publish(self._channel, "")
        except FAULTS as error:
            return reason_of(error)
        return ""

    @asynccontextmanager
    async def listening(self, heard: Callable[[], None]) -> AsyncGenerator[None]:
        """Call `heard` for every notice, and whenever one may have been missed, as long as the context lasts."""
        try:
            async with beside(self._listen(heard)):
                yield
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _listen(self, heard: Callable[[], None]) -> None:
        wait = FIRST_WAIT

        def begun() -> None:
            nonlocal wait
            wait = FIRST_WAIT
            heard()  # what was said while nobody listened

        while True:
            try:
                await self._follow(begun, heard)
            except Exception as error:  # noqa: BLE001  the edge of this task: dead, nobody would listen
                if not self._down:
                    log.warning("notices.lost", extra={"fields": {"reason": reason_of(error)}})
                self._down = True
                with suppress(*FAULTS):
                    await self._client.aclose()  # the server may be another from now on
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _follow(self, begun: Callable[[], None], heard: Callable[[], None]) -> None:
        """Listen on one connection until it fails, which raises what the library or the system raises."""
        async with asyncio.timeout(3 * CONNECT_SECONDS):
            await self._client.initialize()  # a cluster's channel is at the node that has its slot
        async with self._client.pubsub() as channel:
            async with asyncio.timeout(2 * CONNECT_SECONDS):
                await channel.subscribe(self._channel)
            asked = False
            while True:
                notice = await channel.get_message(timeout=CONNECT_SECONDS if asked else PING_SECONDS)
                if notice is None:
                    if asked:
                        raise TimeoutError
                    await channel.ping()
                asked = notice is None
                kind = notice["type"] if notice is not None else ""
                if kind == "subscribe":
                    if self._down:
                        log.warning("notices.recovered")
                    self._down = False
                    begun()
                elif kind == "message":
                    heard()
