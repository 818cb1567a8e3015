"""Look-ups of keys gathered into few queries: one at a time, paced, each for every key that was asked for meanwhile.

However many callers guess, the store gets a bounded number of queries of bounded size; remembers nothing itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from itertools import islice
from typing import Final

from proxy.outages import KeyStoreDown
from proxy.storedkeys import StoredKey

PACE_SECONDS: Final = 0.02
"""After each query; so there are at most 50 a second."""
MOST_AT_ONCE: Final = 500
MOST_WAITING: Final = 5_000

type Outcome = StoredKey | KeyStoreDown | None
type Keep = Callable[[Collection[str], Mapping[str, StoredKey]], Mapping[str, StoredKey | None]]


class Lookups:
    """Asks `ask` for keys, and hands what it gives to `keep`, whose word is the answer.

    One query serves everybody who waits for the same key, and goes on when one of them leaves.
    """

    def __init__(self, ask: Callable[[Collection[str]], Awaitable[Mapping[str, StoredKey]]], keep: Keep) -> None:
        self._ask = ask
        self._keep = keep
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}
        self._asked: dict[str, asyncio.Future[Outcome]] = {}
        self._era = 0
        self._task: asyncio.Task[None] | None = None

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._asked or key_id in self._waiting

    async def find(self, key_id: str) -> StoredKey | None:
        """Give the key, or None. Raises KeyStoreDown, also when too many others wait."""
        future = self._asked.get(key_id) or self._waiting.get(key_id)
        if future is None:
            if len(self._waiting) >= MOST_WAITING:
                raise KeyStoreDown(reason="too many look-ups wait")
            future = self._waiting[key_id] = asyncio.get_running_loop().create_future()
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
        outcome = await asyncio.shield(future)
        if isinstance(outcome, KeyStoreDown):
            raise KeyStoreDown(reason=outcome.reason)
        return outcome

    def distrust(self) -> None:
        """Let no query that is under way be believed."""
        self._era += 1

    def tasks(self) -> list[asyncio.Task[None]]:
        """Give what still runs."""
        return [self._task] if self._task is not None else []

    async def _run(self) -> None:
        try:
            while self._waiting:
                self._asked = dict(islice(self._waiting.items(), MOST_AT_ONCE))
                for key_id in self._asked:
                    del self._waiting[key_id]
                outcomes = await self._query(self._asked)
                self._settle(self._asked, outcomes)
                await asyncio.sleep(PACE_SECONDS)
        finally:
            # Whatever ended this task, nobody is left waiting for ever.
            gone = KeyStoreDown(reason="the look-up was given up")
            for left in (self._asked, self._waiting):
                self._settle(left, dict.fromkeys(left, gone))

    async def _query(self, key_ids: Collection[str]) -> Mapping[str, Outcome]:
        era = self._era
        try:
            found = await self._ask(key_ids)
        except KeyStoreDown as problem:
            return dict.fromkeys(key_ids, problem)
        if era != self._era:
            return dict.fromkeys(key_ids, KeyStoreDown(reason="the key store was rewound"))
        return self._keep(key_ids, found)

    def _settle(self, futures: dict[str, asyncio.Future[Outcome]], outcomes: Mapping[str, Outcome]) -> None:
        for key_id, future in futures.items():
            if not future.done():
                future.set_result(outcomes[key_id])
        futures.clear()
