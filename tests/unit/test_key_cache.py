"""What a process knows of keys: how often it asks, how long it trusts, and when it changes its mind.

The store is a fake that counts and can be stopped; the clock is the test's.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from proxy import keycache, keylookup
from proxy.keycache import KeyCache
from proxy.outages import KeyStoreDown
from proxy.storedkeys import KeyStore, StoredKey

ALICE = StoredKey("A" * 12, "alice", "a" * 64, frozenset())


@dataclass
class FakeStore:
    """A key store in memory, which can be down, and can hold its answers back."""

    keys: dict[str, StoredKey] = field(default_factory=dict)
    number: int = 0
    is_down: bool = False
    finds: list[set[str]] = field(default_factory=list)
    uses: dict[str, int] = field(default_factory=dict)
    asked: int = 0
    gate: asyncio.Event | None = None

    def put(self, key: StoredKey) -> None:
        """Write a key, as a command would."""
        self.number += 1
        self.keys[key.id] = dataclasses.replace(key, changed=self.number)

    async def find(self, key_ids: Collection[str]) -> Mapping[str, StoredKey]:
        self.finds.append(set(key_ids))
        found = {key_id: self.keys[key_id] for key_id in key_ids if key_id in self.keys}
        if self.gate is not None:
            await self.gate.wait()
        self._answer()
        return found

    async def change_number(self) -> int:
        self.asked += 1
        self._answer()
        return self.number

    async def changed_since(self, number: int) -> Sequence[StoredKey]:
        self._answer()
        return [key for key in self.keys.values() if key.changed > number]

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        self._answer()
        self.uses |= uses

    def _answer(self) -> None:
        if self.is_down:
            raise KeyStoreDown(reason="fake")


@dataclass
class World:
    """A store, a cache before it, and the time in seconds."""

    most: int = 100
    now: float = 0.0
    store: FakeStore = field(default_factory=FakeStore)

    def __post_init__(self) -> None:
        """Build the cache."""
        store: KeyStore = self.store
        self.cache = KeyCache(store, grace=300, clock=lambda: self.now, ticks=lambda: self.now, most=self.most)


@pytest.fixture
async def world() -> World:
    """Begin with Alice in the store, seen by nobody."""
    made = World()
    made.store.put(ALICE)
    await made.cache.refresh()
    return made


async def test_a_known_key_is_not_asked_for_again(world: World) -> None:
    """The first use asks the store, a thousand later ones do not."""
    for _ in range(1000):
        assert await world.cache.find(ALICE.id)
        assert world.cache.recall(ALICE.id)

    assert world.store.finds == [{ALICE.id}]


async def test_an_unknown_key_is_not_asked_for_again(world: World) -> None:
    """That a key does not exist is remembered, too."""
    for _ in range(1000):
        assert await world.cache.find("Z" * 12) is None

    assert world.store.finds == [{"Z" * 12}]


async def test_misses_of_one_key_make_one_query(world: World) -> None:
    """A hundred first requests at once are one question."""
    keys = await asyncio.gather(*(world.cache.find(ALICE.id) for _ in range(100)))

    assert world.store.finds == [{ALICE.id}]
    assert {key.name for key in keys if key is not None} == {"alice"}


async def test_a_flood_of_guesses_makes_few_queries(world: World) -> None:
    """Two thousand different guesses at once take five queries, and a caller among them is found."""
    guesses = [f"{number:012}" for number in range(2000)]

    *absent, found = await asyncio.gather(*(world.cache.find(key_id) for key_id in [*guesses, ALICE.id]))

    assert set(absent) == {None}
    assert found is not None
    assert len(world.store.finds) <= 1 + -(-2001 // keylookup.MOST_AT_ONCE)
    assert max(map(len, world.store.finds)) <= keylookup.MOST_AT_ONCE


async def test_too_many_guesses_are_turned_away(world: World) -> None:
    """What waits is bounded: beyond it the answer is that nobody can tell, not that the key is wrong."""
    world.store.gate = asyncio.Event()
    guesses = (f"{number:012}" for number in range(keylookup.MOST_WAITING + keylookup.MOST_AT_ONCE + 10))
    tasks = [asyncio.create_task(world.cache.find(key_id)) for key_id in guesses]
    await asyncio.sleep(0)
    world.store.gate.set()

    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert 0 < sum(isinstance(outcome, KeyStoreDown) for outcome in outcomes) <= keylookup.MOST_AT_ONCE + 10
    assert all(outcome is None or isinstance(outcome, KeyStoreDown) for outcome in outcomes)


async def test_what_is_kept_is_bounded() -> None:
    """Guesses push out guesses and never a key; the key that was longest unused goes first."""
    world = World(most=3)
    keys = [dataclasses.replace(ALICE, id=letter * 12) for letter in "abcd"]
    for key in keys:
        world.store.put(key)
    await world.cache.refresh()
    for key in keys[:3]:
        await world.cache.find(key.id)
    for number in range(50):
        await world.cache.find(f"{number:012}")
    world.cache.recall(keys[0].id)
    await world.cache.find(keys[3].id)

    assert [world.cache.recall(key.id) is not None for key in keys] == [True, False, True, True]
    assert len(world.cache._absent) == 3


async def test_a_revocation_is_seen_at_the_next_reading(world: World) -> None:
    """What changed is put right without a question for it."""
    await world.cache.find(ALICE.id)
    world.store.put(dataclasses.replace(ALICE, revoked=1))
    await world.cache.refresh()

    key = world.cache.recall(ALICE.id)

    assert key is not None
    assert key.refusal_at(0) == "key revoked"
    assert len(world.store.finds) == 1


async def test_a_key_that_was_guessed_before_it_was_made_works(world: World) -> None:
    """That it did not exist is forgotten at the next reading."""
    bob = dataclasses.replace(ALICE, id="B" * 12)
    assert await world.cache.find(bob.id) is None
    world.store.put(bob)
    await world.cache.refresh()

    assert await world.cache.find(bob.id)


async def test_a_change_during_a_look_up_wins(world: World) -> None:
    """A row that was read before a revocation, and arrives after it, does not bring the key back."""
    world.store.gate = asyncio.Event()
    looking = asyncio.create_task(world.cache.find(ALICE.id))
    while not world.store.finds:
        await asyncio.sleep(0)
    world.store.put(dataclasses.replace(ALICE, revoked=1))
    await world.cache.refresh()
    world.store.gate.set()

    for key in (await looking, world.cache.recall(ALICE.id)):
        assert key is not None
        assert key.refusal_at(0) == "key revoked"


async def test_a_store_set_back_is_believed(world: World) -> None:
    """After a restore the numbers begin lower; all that was known is asked for anew."""
    await world.cache.find(ALICE.id)
    world.store.keys.clear()
    world.store.number = 0
    await world.cache.refresh()

    assert world.cache.recall(ALICE.id) is None
    assert await world.cache.find(ALICE.id) is None


async def test_a_look_up_across_a_restore_is_not_believed(world: World) -> None:
    """What was read before the store was set back proves nothing after it."""
    world.store.gate = asyncio.Event()
    looking = asyncio.create_task(world.cache.find(ALICE.id))
    while not world.store.finds:
        await asyncio.sleep(0)
    world.store.keys.clear()
    world.store.number = 0
    await world.cache.refresh()
    world.store.gate.set()

    with pytest.raises(KeyStoreDown):
        await looking


async def test_a_caller_who_leaves_takes_nobody_with_him(world: World) -> None:
    """The query goes on for the others who wait for the same key."""
    world.store.gate = asyncio.Event()
    leaving, staying = (asyncio.create_task(world.cache.find(ALICE.id)) for _ in range(2))
    while not world.store.finds:
        await asyncio.sleep(0)
    leaving.cancel()
    world.store.gate.set()

    assert await staying
    assert len(world.store.finds) == 1


async def test_known_keys_go_on_while_the_store_is_down(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """For the grace and no longer; unknown keys are neither let in nor refused, and the store is not asked for them."""
    await world.cache.find(ALICE.id)
    await world.cache.find("Z" * 12)
    world.store.is_down, asked = True, len(world.store.finds)
    with caplog.at_level(logging.WARNING):
        for world.now in (2.0, 4.0, 300.0):
            await world.cache.refresh()
            assert world.cache.recall(ALICE.id)
            for unknown in ("Y" * 12, "Z" * 12):
                with pytest.raises(KeyStoreDown):
                    await world.cache.find(unknown)
        world.now = 300.1
        assert world.cache.is_lost
        assert world.cache.recall(ALICE.id) is None
        with pytest.raises(KeyStoreDown):
            await world.cache.find(ALICE.id)
        world.store.is_down = False
        await world.cache.refresh()

    assert world.cache.recall(ALICE.id)
    assert len(world.store.finds) == asked
    assert [record.message for record in caplog.records] == ["key_store.lost", "key_store.recovered"]


async def test_what_changed_while_the_store_was_down_is_seen_when_it_is_back(world: World) -> None:
    """The number that was read last is remembered across the outage."""
    await world.cache.find(ALICE.id)
    world.store.is_down = True
    await world.cache.refresh()
    world.store.put(dataclasses.replace(ALICE, revoked=1))
    world.store.is_down = False
    await world.cache.refresh()

    key = world.cache.recall(ALICE.id)

    assert key is not None
    assert key.revoked == 1


async def test_a_watch_that_stops_is_an_outage(world: World) -> None:
    """Trust ends with the last word from the store, whoever failed to ask again."""
    await world.cache.find(ALICE.id)
    world.now = 301

    assert world.cache.recall(ALICE.id) is None


async def test_a_use_that_cannot_be_written_does_not_end_the_writing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a library raises once, later uses are written while the proxy runs."""
    monkeypatch.setattr(keycache, "NOTE_SECONDS", 0.0)
    written = asyncio.Event()

    async def note(uses: Mapping[str, int]) -> None:
        if "A" * 12 in uses:
            raise RuntimeError
        written.set()

    monkeypatch.setattr(world.store, "note_uses", note)
    async with world.cache.watching(), asyncio.timeout(10):
        world.cache.note_use("A" * 12)
        while world.cache._uses:
            await asyncio.sleep(0)
        world.cache.note_use("B" * 12)
        await written.wait()


async def test_uses_are_written_at_the_end_to_the_minute(world: World) -> None:
    """However often a key was used, one time is written, without waiting for the next round."""
    async with world.cache.watching():
        await world.cache.find(ALICE.id)
        for world.now in (60, 119, 125, 179):
            world.cache.note_use(ALICE.id)
        assert world.store.uses == {}

    assert world.store.uses == {ALICE.id: 120}


async def test_a_file_s_keys_need_no_store() -> None:
    """Pinned keys are known without a question, before another of the same id, and whatever the store does."""
    world = World()
    cache = KeyCache(world.store, pinned=[ALICE], grace=300, ticks=lambda: world.now)
    world.store.put(dataclasses.replace(ALICE, name="impostor"))
    world.now, world.store.is_down = 10_000, True
    key = cache.recall(ALICE.id)

    assert key == ALICE
    assert await cache.find(ALICE.id) == ALICE
    assert await KeyCache(pinned=[ALICE]).find("Z" * 12) is None


async def test_news_are_read_at_once_and_no_oftener_than_is_good(world: World) -> None:
    """What a notice tells of is known long before the next turn; a flood of notices makes ten readings a second."""
    key_id = ALICE.id
    async with world.cache.watching():
        await world.cache.find(key_id)
        world.store.put(dataclasses.replace(ALICE, revoked=1))
        async with asyncio.timeout(keycache.POLL_SECONDS - 0.1):
            world.cache.look_again()
            while (key := world.cache.recall(key_id)) is None or key.revoked is None:
                await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        before, began = world.store.asked, loop.time()
        while loop.time() - began < 0.35:
            world.cache.look_again()
            await asyncio.sleep(0)
        asked, seconds = world.store.asked - before, loop.time() - began

    assert 1 <= asked <= seconds / keycache.LEAST_SECONDS + 1
