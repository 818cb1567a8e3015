"""What every KeyStore keeps to: a file's keys, SQLite's and Postgres's alike; then what the two databases add.

Postgres is a real server; where it cannot start, this fails.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sql

from proxy.keys import StaticKeyStore
from proxy.keystore import SqlKeyStore
from proxy.outages import KeyStoreDown
from proxy.storedkeys import KeyRefusedError, KeyStore, StoredKey
from tests.support.postgres import Postgres, running_postgres

ALICE = StoredKey("A" * 12, "alice", "a" * 64, frozenset({"agent:invoke", "agent:stream"}), caller="A" * 12)
BOB = StoredKey(
    "B" * 12, "bob", "b" * 64, frozenset(), tier="gold", rate="5/second", caller="A" * 12, expires=9, created_by="é"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """Run one server for the module."""
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SqlKeyStore]:
    """Give an empty, migrated database of either kind."""
    url = f"sqlite+aiosqlite:///{tmp_path}/keys.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").url
    store = SqlKeyStore(url, patience=20)
    try:
        await store.migrate()
        yield store
        await _empty(store)
    finally:
        await store.close()


async def _empty(store: SqlKeyStore) -> None:
    async with store._asking() as connection:
        for statement in ("DELETE FROM api_keys", "UPDATE key_changes SET number = 0"):
            await connection.exec_driver_sql(statement)


@pytest.fixture(params=["static", "sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KeyStore]:
    """Give a store of each kind that holds Alice and Bob."""
    if request.param == "static":
        yield StaticKeyStore([ALICE, BOB])
        return
    url = f"sqlite+aiosqlite:///{tmp_path}/keys.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").url
    made = SqlKeyStore(url, patience=20)
    try:
        await made.migrate()
        await made.add([ALICE, BOB])
        yield made
        await _empty(made)
    finally:
        await made.close()


def _same(found: StoredKey | None, stored: StoredKey) -> bool:
    return found is not None and dataclasses.replace(found, changed=0) == stored


async def test_keys_are_found_by_their_whole_ids(store: KeyStore) -> None:
    """What was asked for and exists is given whole; nothing else is, whatever looks like it."""
    found = await store.find(["A" * 12, "B" * 12, "C" * 12, "a" * 12, "alice", "%", ""])

    assert set(found) == {"A" * 12, "B" * 12}
    assert _same(found["A" * 12], ALICE)
    assert _same(found["B" * 12], BOB)


async def test_nobody_is_found_for_nothing(store: KeyStore) -> None:
    """No ids, no keys."""
    assert await store.find([]) == {}


async def test_what_has_not_changed_is_not_told(store: KeyStore) -> None:
    """After the number that was read, nothing changed."""
    assert list(await store.changed_since(await store.change_number())) == []


async def test_a_use_is_no_change(store: KeyStore) -> None:
    """When a key was used is noted without telling every process of it; ids that do not exist harm nothing."""
    before = await store.change_number()

    await store.note_uses({"A" * 12: 60, "Z" * 12: 60})

    assert await store.change_number() == before


async def test_the_latest_use_stays(database: SqlKeyStore) -> None:
    """Two processes write their uses in any order; the later use is kept."""
    await database.add([ALICE])
    for at in (60, 180, 120):
        await database.note_uses({"A" * 12: at})

    assert [key.last_used for key in await database.all_keys()] == [180]


async def test_each_change_is_told_once_with_all_that_holds(database: SqlKeyStore) -> None:
    """A reader that remembers the number sees every later change, as it stands, and no earlier one."""
    await database.add([ALICE])
    seen = await database.change_number()
    await database.add([dataclasses.replace(BOB, caller="")])
    await database.revoke(["B" * 12], 77)

    (told,) = await database.changed_since(seen)

    assert (told.id, told.revoked, told.caller) == ("B" * 12, 77, "B" * 12)


async def test_no_change_is_missed_whatever_commits_first(database: SqlKeyStore) -> None:
    """A reader that follows the numbers while twenty writers race ends with every key, none skipped."""
    keys = [dataclasses.replace(ALICE, id=f"{n:012}", name=f"n{n}", caller=f"{n:012}") for n in range(20)]
    seen, told = await database.change_number(), set[str]()

    async def follow() -> None:
        nonlocal seen
        while len(told) < len(keys):
            number = await database.change_number()
            told.update(key.id for key in await database.changed_since(seen))
            seen = number

    async with asyncio.timeout(60):
        await asyncio.gather(follow(), *(database.add([key]) for key in keys))

    assert told == {key.id for key in keys}


async def test_a_rotation_keeps_both_until_the_grace_ends(database: SqlKeyStore) -> None:
    """The successor has the name, the old key has an end, and neither is refused before it."""
    await database.add([ALICE])
    await database.rotate(ALICE, dataclasses.replace(ALICE, id="S" * 12, digest="5" * 64), grace_ends=100)

    old, new = [dict(await database.find([key_id]))[key_id] for key_id in ("A" * 12, "S" * 12)]

    assert (old.replaced_by, old.grace_ends, new.caller, new.name) == ("S" * 12, 100, "A" * 12, "alice")
    assert (old.refusal_at(99), new.refusal_at(99)) == ("", "")
    assert (old.refusal_at(100), new.refusal_at(100)) == ("key replaced", "")


async def test_a_key_is_rotated_once(database: SqlKeyStore) -> None:
    """Of two rotations at once, one is refused: a key has one successor."""
    await database.add([ALICE])
    heirs = [dataclasses.replace(ALICE, id=letter * 12, digest=letter * 64) for letter in "cd"]

    outcomes = await asyncio.gather(
        *(database.rotate(ALICE, heir, grace_ends=100) for heir in heirs), return_exceptions=True
    )

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["KeyRefusedError", "NoneType"]
    assert len(await database.all_keys()) == 2


async def test_a_rotation_does_not_give_back_what_was_taken(database: SqlKeyStore) -> None:
    """A key that lost a scope, or was given an end, since it was read has no successor with what it had."""
    await database.add([BOB, ALICE])
    for narrower in (
        dataclasses.replace(ALICE, scopes=frozenset()),
        dataclasses.replace(ALICE, expires=7),
        dataclasses.replace(ALICE, rate="1/day"),
    ):
        await database.add([narrower])
        with pytest.raises(KeyRefusedError, match="or just changed"):
            await database.rotate(ALICE, dataclasses.replace(ALICE, id="C" * 12, digest="c" * 64), grace_ends=100)

    assert len(await database.all_keys()) == 2


async def test_a_word_that_means_two_keys_means_none(database: SqlKeyStore) -> None:
    """Where one key is named as another's id is written, neither is revoked for the other; each has another word."""
    namesake = dataclasses.replace(BOB, name=ALICE.id)
    await database.add([ALICE, namesake])

    with pytest.raises(KeyRefusedError, match="is a key's id and another's name"):
        await database.matching(ALICE.id)

    found = [[key.id for key in await database.matching(word)] for word in (ALICE.name, BOB.id)]
    assert found == [[ALICE.id], [BOB.id]]


async def test_a_name_is_one_current_keys(database: SqlKeyStore) -> None:
    """A second key of a name is refused, and nothing of that call is written; a revoked key's name is free."""
    await database.add([ALICE])
    same_name: Sequence[StoredKey] = [BOB, dataclasses.replace(BOB, id="C" * 12, name="alice")]
    with pytest.raises(KeyRefusedError, match="alice: another key has this name"):
        await database.add(same_name)
    before = [key.id for key in await database.all_keys()]

    await database.revoke(["A" * 12], 5)
    await database.add(same_name)

    assert before == ["A" * 12]
    assert len(await database.all_keys()) == 3


async def test_what_is_declared_twice_changes_nothing(database: SqlKeyStore) -> None:
    """Adding the same again is unchanged, another scope is a change, and another digest for an id is refused."""
    wider = dataclasses.replace(ALICE, scopes=frozenset({"agent:ping"}))

    outcomes = [(await database.add([key]))["A" * 12] for key in (ALICE, ALICE, wider)]

    assert outcomes == ["created", "unchanged", "changed"]
    with pytest.raises(KeyRefusedError, match="belongs to another key"):
        await database.add([dataclasses.replace(ALICE, digest="f" * 64)])


async def test_names_may_be_exchanged_and_handed_on(database: SqlKeyStore) -> None:
    """What counts is whose each name is in the end, in whatever order the keys are declared."""
    carol = dataclasses.replace(BOB, id="C" * 12, digest="c" * 64, name="carol")
    await database.add([ALICE, BOB])

    swapped = [dataclasses.replace(ALICE, name="bob"), dataclasses.replace(BOB, name="alice")]
    outcomes = [await database.add(swapped)]
    handed_on = [dataclasses.replace(carol, name="bob"), dataclasses.replace(ALICE, name="anna")]
    outcomes.append(await database.add(handed_on))

    assert [list(outcome.values()) for outcome in outcomes] == [["changed", "changed"], ["created", "changed"]]
    names = {key.id[0]: (key.name, key.changed) for key in await database.all_keys()}
    assert names == {"A": ("anna", 3), "B": ("alice", 2), "C": ("bob", 3)}


@pytest.mark.parametrize(
    "last",
    [
        dataclasses.replace(BOB, id="Z" * 12, name="alice"),
        dataclasses.replace(BOB, id="Z" * 12, name="n7"),
        dataclasses.replace(BOB, name="alice"),
        dataclasses.replace(BOB, digest="f" * 64),
        dataclasses.replace(BOB, id=f"{7:012}", digest="f" * 64, name="n7"),
    ],
    ids=["a new key", "a name that comes twice", "a renamed key", "another key's id", "an id that comes twice"],
)
async def test_of_many_keys_all_are_written_or_none(database: SqlKeyStore, last: StoredKey) -> None:
    """The last of a thousand is told by its name, and nothing of them is there, not even their number."""
    await database.add([ALICE, BOB])
    before = await database.all_keys(), await database.change_number()
    keys = [dataclasses.replace(BOB, id=f"{n:012}", name=f"n{n}", caller=f"{n:012}") for n in range(1000)]

    with pytest.raises(KeyRefusedError, match=f"^{last.name}: "):
        await database.add([dataclasses.replace(ALICE, tier="gold"), *keys, last])

    assert (await database.all_keys(), await database.change_number()) == before


async def test_many_keys_are_few_statements(database: SqlKeyStore) -> None:
    """New, changed, unchanged, renamed: not a statement for each key, of which tens of thousands come at once."""
    keys = [dataclasses.replace(BOB, id=f"{n:012}", name=f"n{n}", caller=f"{n:012}") for n in range(2000)]
    other = [
        dataclasses.replace(key, tier="free", name=f"m{key.name}" if int(key.id) % 3 else key.name) for key in keys
    ]
    told: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        told.append(statement)

    sql.event.listen(database._engine.sync_engine, "before_cursor_execute", note)
    try:
        outcomes = [set((await database.add(part)).values()) for part in (keys, keys, other)]
    finally:
        sql.event.remove(database._engine.sync_engine, "before_cursor_execute", note)

    assert outcomes == [{"created"}, {"unchanged"}, {"changed"}]
    assert len(told) < 50
    assert {key.name for key in await database.all_keys()} == {key.name for key in other}


async def test_a_revoked_key_cannot_be_declared_back(database: SqlKeyStore) -> None:
    """Writing a revoked key again leaves it revoked."""
    await database.add([ALICE])
    await database.revoke(["A" * 12], 5)
    await database.add([dataclasses.replace(ALICE, tier="gold")])

    assert [(key.revoked, key.tier) for key in await database.all_keys()] == [(5, "gold")]


async def test_a_schema_of_another_version_is_known(database: SqlKeyStore) -> None:
    """Newest is newest; with another version's mark it is not."""
    migrated = await database.is_migrated()
    try:
        async with database._asking() as connection:
            await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        other = await database.is_migrated()
    finally:
        async with database._asking() as connection:
            await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")

    assert (migrated, other) == (True, False)


async def test_a_store_that_is_not_there_is_down(tmp_path: Path) -> None:
    """No file, no server, no answer: one error, with the library's own word for the log."""
    for url in (f"sqlite+aiosqlite:///{tmp_path}/none/keys.db", "postgresql+asyncpg://proxy@127.0.0.1:1/postgres"):
        store = SqlKeyStore(url)
        with pytest.raises(KeyStoreDown) as down:
            await store.change_number()
        await store.close()
        assert down.value.reason


async def test_many_migrations_at_once_are_one(postgres: Postgres) -> None:
    """Three replicas that migrate at their start do not meet."""
    store = SqlKeyStore(postgres.url, patience=20)
    async with store._asking() as connection:
        for table in ("api_keys", "key_changes", "alembic_version"):
            await connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")
    others = [SqlKeyStore(postgres.url, patience=20) for _ in range(3)]

    await asyncio.gather(*(other.migrate() for other in others))

    assert await store.is_migrated()
    for other in (store, *others):
        await other.close()
