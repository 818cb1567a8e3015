"""What this process knows of keys: looked up once, then kept, and put right by what the store says has changed.

Holds digests only, at most so many of them; never trusts what it knows longer than the store's grace (docs/adr/0012).
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from proxy.keylookup import Lookups
from proxy.outages import KeyStoreDown
from proxy.storedkeys import KeyStore, StoredKey
from proxy.tasks import end

log: Final = logging.getLogger("agentflow_proxy.keys")
POLL_SECONDS: Final = 1.5
"""Between two readings of the store's changes; with the store's own patience, under 5 s."""
LEAST_SECONDS: Final = 0.1
"""Between two readings, however often somebody says that there is something to read."""
NOTE_SECONDS: Final = 10.0
"""Between two writings of when keys were last used."""
MOST_KEYS: Final = 10_000


class KeyCache:
    """The keys that callers have presented, and those that do not exist; either is bounded, the oldest goes first.

    `pinned` keys are always known. Others are looked up in `store`, and are good for `grace` seconds after the
    store was last heard. `clock` is in Unix seconds, `ticks` in seconds of a monotonic clock.
    """

    def __init__(
        self,
        store: KeyStore | None = None,
        *,
        pinned: Iterable[StoredKey] = (),
        grace: float = 0,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
        most: int = MOST_KEYS,
    ) -> None:
        self._store = store
        self.pin(pinned)
        self._grace = grace
        self._clock = clock
        self._ticks = ticks
        self._most = most
        self._known: OrderedDict[str, StoredKey] = OrderedDict()
        self._absent: OrderedDict[str, None] = OrderedDict()
        self._lookups = Lookups(store.find, self._keep) if store is not None else None
        self._uses: dict[str, int] = {}
        self._seen = -1
        self._heard = ticks()
        self._down_since: float | None = None
        self._news = asyncio.Event()

    def pin(self, keys: Iterable[StoredKey]) -> None:
        """Know these keys always, and no longer those that were pinned before."""
        self._pinned = {key.id: key for key in keys}

    def recall(self, key_id: str) -> StoredKey | None:
        """Give the key if it is known here, and the store was heard of recently enough to trust that."""
        key = self._pinned.get(key_id)
        if key is not None:
            return key
        key = self._known.get(key_id)
        if key is None or self.is_lost:
            return None
        self._known.move_to_end(key_id)
        return key

    async def find(self, key_id: str) -> StoredKey | None:
        """Give the key, or None when there is none. Raises KeyStoreDown when nobody can tell."""
        key = self.recall(key_id)
        if key is not None or self._lookups is None:
            return key
        if self._down_since is not None or self.is_lost:
            raise KeyStoreDown(reason="the key store is down")
        if key_id in self._absent:
            return None
        return await self._lookups.find(key_id)

    def note_use(self, key_id: str) -> None:
        """Remember, to the minute, that the key was used; written later."""
        if self._store is not None and key_id not in self._pinned:
            self._uses[key_id] = int(self._clock()) // 60 * 60

    def look_again(self) -> None:
        """Have the store's changes read at once rather than at the next turn; may be said as often as one likes."""
        self._news.set()

    @property
    def is_lost(self) -> bool:
        """Whether the store has been silent for longer than the grace, so that no key of it works."""
        return self._store is not None and self._ticks() - self._heard > self._grace

    @property
    def is_down(self) -> bool:
        """Whether the store did not answer when it was last asked."""
        return self._down_since is not None

    async def refresh(self) -> None:
        """Read what has changed since the last time. A store that is down is logged, when that begins and ends."""
        assert self._store is not None  # noqa: S101  only watched then
        asked = self._ticks()
        try:
            number = await self._store.change_number()
            if self._seen < 0 or number < self._seen:
                self._forget(number)
            elif number > self._seen:
                self._correct(await self._store.changed_since(self._seen))
        except KeyStoreDown as problem:
            self._lose(problem.reason)
            return
        self._seen = number
        self._heard = asked
        if self._down_since is not None:
            log.warning("key_store.recovered", extra={"fields": {"down_seconds": round(asked - self._down_since, 3)}})
            self._down_since = None

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Keep what is known right, as long as the context lasts."""
        if self._store is None or self._lookups is None:
            yield
            return
        await self.refresh()
        watch, notes = asyncio.create_task(self._watch()), asyncio.create_task(self._note())
        try:
            yield
        finally:
            await end(watch, notes, *self._lookups.tasks())
            await self._write_uses()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LEAST_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS - LEAST_SECONDS):
                    await self._news.wait()
            self._news.clear()
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001  the edge of this task: dead, it would leave the cache unwatched
                self._lose(type(error).__name__)

    async def _note(self) -> None:
        while True:
            await asyncio.sleep(NOTE_SECONDS)
            if self._down_since is None:
                try:
                    await self._write_uses()
                except Exception as error:  # noqa: BLE001  the edge of this task: dead, it would write no use any more
                    log.warning("key_uses.lost", extra={"fields": {"reason": type(error).__name__}})

    async def _write_uses(self) -> None:
        uses, self._uses = self._uses, {}
        if self._store is None or not uses:
            return
        try:
            await self._store.note_uses(uses)
        except KeyStoreDown as problem:
            kept = {key_id: at for key_id, at in uses.items() if key_id in self._known}
            self._uses = kept | self._uses
            log.warning("key_uses.unwritten", extra={"fields": {"keys": len(uses), "reason": problem.reason}})

    def _keep(self, asked: Iterable[str], found: Mapping[str, StoredKey]) -> dict[str, StoredKey | None]:
        """Keep what a look-up gave, unless a newer change was seen meanwhile; give what holds."""
        held: dict[str, StoredKey | None] = {}
        for key_id in asked:
            known, key = self._known.get(key_id), found.get(key_id)
            if known is not None and (key is None or key.changed < known.changed):
                key = known
            held[key_id] = key
            if key is None:
                _remember(self._absent, key_id, None, self._most)
            else:
                _remember(self._known, key_id, key, self._most)
        return held

    def _correct(self, changed: Iterable[StoredKey]) -> None:
        assert self._lookups is not None  # noqa: S101  only watched then
        for key in changed:
            if key.id in self._known or key.id in self._absent or key.id in self._lookups:
                self._absent.pop(key.id, None)
                _remember(self._known, key.id, key, self._most)

    def _forget(self, number: int) -> None:
        """Begin anew: at the start, and with a store set back, numbers say nothing of what is known here."""
        assert self._lookups is not None  # noqa: S101  only watched then
        self._known.clear()
        self._absent.clear()
        self._lookups.distrust()
        if self._seen >= 0:
            log.warning("key_store.rewound", extra={"fields": {"seen": self._seen, "now": number}})

    def _lose(self, reason: str) -> None:
        if self._down_since is None:
            self._down_since = self._ticks()
            log.error("key_store.lost", extra={"fields": {"reason": reason, "grace_seconds": self._grace}})


def _remember[Value](values: OrderedDict[str, Value], key_id: str, value: Value, most: int) -> None:
    values[key_id] = value
    values.move_to_end(key_id)
    if len(values) > most:
        values.popitem(last=False)
