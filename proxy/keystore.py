"""API keys in a database, SQLite or Postgres: looked up, watched for changes, and written by the commands.

Never sees a key, only digests; every answer comes within a stated time, or is KeyStoreDown.
"""

import asyncio
import dataclasses
import inspect
import itertools
import os
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import aiosqlite
import asyncpg  # type: ignore[import-untyped]
import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from proxy.migrations import is_at_head, upgrade
from proxy.outages import KeyStoreDown
from proxy.storedkeys import KeyRefusedError, StoredKey

ANSWER_SECONDS: Final = 1.5
"""How long one answer to a serving process may take; with the time between polls it bounds a revocation."""
_CONNECTIONS: Final = 3  # one each for the watch, the look-ups and the uses
_LAST_PORT: Final = 65_535
_BATCH: Final = 400
"""Keys that one statement asks for, by id and by name: SQLite once took 999 values at most."""
_NO_ADDRESS: Final = (
    "is no address of a database: %-code what is neither letter nor digit in user and password, "
    "and after ? name asyncpg's options only (sslmode is called ssl there)"
)

METADATA: Final = sql.MetaData()
KEYS: Final = sql.Table(
    "api_keys",
    METADATA,
    sql.Column("id", sql.String(12), primary_key=True),
    sql.Column("name", sql.String(64), nullable=False),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("scopes", sql.Text, nullable=False),
    sql.Column("tier", sql.String(64), nullable=False),
    sql.Column("rate", sql.String(255)),
    sql.Column("caller", sql.String(12), nullable=False),
    sql.Column("created", sql.BigInteger, nullable=False),
    sql.Column("expires", sql.BigInteger),
    sql.Column("last_used", sql.BigInteger),
    sql.Column("created_by", sql.String(255), nullable=False),
    sql.Column("replaced_by", sql.String(12)),
    sql.Column("grace_ends", sql.BigInteger),
    sql.Column("revoked", sql.BigInteger),
    sql.Column("changed", sql.BigInteger, nullable=False),
)
_CHANGEABLE: Final = ("name", "scopes", "tier", "rate", "expires")
CHANGES: Final = sql.Table("key_changes", METADATA, sql.Column("number", sql.BigInteger, nullable=False))


class SqlKeyStore:
    """Keys in the database at `url`, an address as SQLAlchemy writes it. `patience` bounds each answer, in seconds.

    Raises ValueError when the address cannot be read.
    """

    def __init__(self, url: str, *, patience: float = ANSWER_SECONDS) -> None:
        self._patience = patience
        try:
            self._engine = _engine(url, patience)
        except (ArgumentError, ValueError) as error:
            # Not its own words: they may quote what stands after an @ or a colon of the password.
            raise ValueError(_NO_ADDRESS) from error

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def migrate(self) -> None:
        """Bring the schema to the newest version; two at once wait for each other."""
        async with self._asking() as connection:
            await connection.run_sync(upgrade)

    async def is_migrated(self) -> bool:
        """Say whether the schema is the one that this version reads."""
        async with self._asking() as connection:
            return await connection.run_sync(is_at_head)

    async def find(self, key_ids: Collection[str]) -> Mapping[str, StoredKey]:
        async with self._asking() as connection:
            rows = await connection.execute(sql.select(KEYS).where(KEYS.c.id.in_(key_ids)))
            return {row.id: _key_of(dict(row._mapping)) for row in rows}  # noqa: SLF001  SQLAlchemy's public name

    async def change_number(self) -> int:
        async with self._asking() as connection:
            return int((await connection.execute(sql.select(CHANGES.c.number))).scalar_one())

    async def changed_since(self, number: int) -> Sequence[StoredKey]:
        return await self._select(KEYS.c.changed > number)

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        unused_since = sql.or_(KEYS.c.last_used.is_(None), KEYS.c.last_used < sql.bindparam("at"))
        statement = sql.update(KEYS).where(KEYS.c.id == sql.bindparam("key_id"), unused_since)
        values = [{"key_id": key_id, "at": at} for key_id, at in sorted(uses.items())]
        async with self._asking() as connection:
            await connection.execute(statement.values(last_used=sql.bindparam("at")), values)

    async def all_keys(self) -> Sequence[StoredKey]:
        """Give every key there ever was, the oldest first."""
        return await self._select(sql.true())

    async def matching(self, word: str) -> Sequence[StoredKey]:
        """Give the key with this id, or every key of this name. Raises KeyRefusedError when there is none, or both."""
        keys = await self._select((KEYS.c.id == word) | (KEYS.c.name == word))
        if not keys:
            raise KeyRefusedError(f"{word}: there is no such key; see: agentflow-proxy keys list")
        if len({key.id == word for key in keys}) > 1:
            raise KeyRefusedError(f"{word}: is a key's id and another's name; say that one's name, or this one's id")
        return keys

    async def add(self, keys: Iterable[StoredKey]) -> dict[str, str]:
        """Write new keys, or change what may change of known ones: name, scopes, tier, rate, expiry. All or none.

        Gives `created`, `changed` or `unchanged` by id. Raises KeyRefusedError for a name that another current
        key has, and for an id with another digest.
        """
        async with self._changing() as (connection, number):
            return await _put(connection, [dataclasses.replace(key, changed=number) for key in keys])

    async def rotate(self, old: StoredKey, new: StoredKey, *, grace_ends: int) -> None:
        """Write `new` in the place of `old`, which works on until `grace_ends` (Unix seconds)."""
        async with self._changing() as (connection, number):
            retired = {"replaced_by": new.id, "grace_ends": grace_ends, "changed": number}
            free = (KEYS.c.id == old.id) & KEYS.c.replaced_by.is_(None) & KEYS.c.revoked.is_(None)
            row = _row_of(old)
            # What the successor inherits was read before the lock, and may have been taken back since.
            same = sql.and_(*(KEYS.c[name].is_not_distinct_from(row[name]) for name in _CHANGEABLE))
            done = await connection.execute(sql.update(KEYS).where(free, same).values(retired))
            if done.rowcount != 1:
                raise KeyRefusedError(f"{old.name}: the key {old.id} was rotated or revoked before, or just changed")
            await _put(connection, [dataclasses.replace(new, changed=number)])

    async def revoke(self, key_ids: Collection[str], now: int) -> None:
        """Let these keys work no more, from `now` on."""
        async with self._changing() as (connection, number):
            chosen = KEYS.c.id.in_(key_ids) & KEYS.c.revoked.is_(None)
            await connection.execute(sql.update(KEYS).where(chosen).values(revoked=now, changed=number))

    async def _select(self, condition: sql.ColumnElement[bool]) -> Sequence[StoredKey]:
        async with self._asking() as connection:
            rows = await connection.execute(sql.select(KEYS).where(condition).order_by(KEYS.c.created, KEYS.c.id))
            return [_key_of(dict(row._mapping)) for row in rows]  # noqa: SLF001  SQLAlchemy's public name

    @asynccontextmanager
    async def _changing(self) -> AsyncGenerator[tuple[AsyncConnection, int]]:
        """Open a transaction that changes keys, and give its number.

        Its first statement locks the one row of `key_changes` to its end, so that numbers become visible in
        the order in which they were drawn: whoever has seen one has seen all before it.
        """
        async with self._asking() as connection:
            grown = sql.update(CHANGES).values(number=CHANGES.c.number + 1).returning(CHANGES.c.number)
            yield connection, int((await connection.execute(grown)).scalar_one())

    @asynccontextmanager
    async def _asking(self) -> AsyncGenerator[AsyncConnection]:
        try:
            async with asyncio.timeout(self._patience), self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise KeyStoreDown(reason=type(error).__name__) from error


async def _put(connection: AsyncConnection, keys: Sequence[StoredKey]) -> dict[str, str]:
    """Insert what is new and update what changed, however many keys in few statements; decided before, under the lock.

    Gives and raises what `SqlKeyStore.add` does.
    """
    digests: dict[str, str] = {}
    for key in keys:
        if digests.setdefault(key.id, key.digest) != key.digest:
            raise KeyRefusedError(f"{key.name}: the id {key.id} belongs to another key")
    known, holders = await _known(connection, keys)
    # In the order in which uses are noted: in two orders each could wait for what the other has locked.
    rows = {key.id: _row_of(key) for key in sorted(keys, key=lambda key: key.id)}
    outcomes = {key.id: _outcome(known.get(key.id), key, rows[key.id]) for key in keys}
    renamed = [key_id for key_id, row in rows.items() if key_id in known and known[key_id].name != row["name"]]
    for key_id in renamed:
        if holders.get(known[key_id].name) == key_id:
            del holders[known[key_id].name]
    for key in keys:
        if _is_current(known.get(key.id)) and holders.setdefault(key.name, key.id) != key.id:
            raise KeyRefusedError(f"{key.name}: another key has this name; rotate or revoke that one")
    this = KEYS.c.id == sql.bindparam("key_id")
    if renamed:  # to what is no name, so that they may exchange theirs
        away = [{"key_id": key_id, "away": f"~{key_id}"} for key_id in renamed]
        await connection.execute(sql.update(KEYS).where(this).values(name=sql.bindparam("away")), away)
    if changed := [rows[key_id] for key_id in rows if outcomes[key_id] == "changed"]:
        values: dict[str, Any] = {name: sql.bindparam(f"new_{name}") for name in (*_CHANGEABLE, "changed")}
        told = [{"key_id": row["id"]} | {f"new_{name}": row[name] for name in values} for row in changed]
        await connection.execute(sql.update(KEYS).where(this).values(values), told)
    if new := [rows[key_id] for key_id in rows if outcomes[key_id] == "created"]:
        await connection.execute(sql.insert(KEYS), new)
    return outcomes


async def _known(
    connection: AsyncConnection, keys: Sequence[StoredKey]
) -> tuple[dict[str, sql.Row[Any]], dict[str, str]]:
    """Give the stored rows that have an id or, being current, a name of `keys`; and the current ones' ids by name."""
    known: dict[str, sql.Row[Any]] = {}
    for batch in itertools.batched(keys, _BATCH, strict=False):
        named = KEYS.c.name.in_([key.name for key in batch]) & KEYS.c.replaced_by.is_(None) & KEYS.c.revoked.is_(None)
        either = sql.select(KEYS).where(KEYS.c.id.in_([key.id for key in batch]) | named)
        known |= {row.id: row for row in await connection.execute(either)}
    return known, {row.name: row.id for row in known.values() if _is_current(row)}


def _is_current(row: sql.Row[Any] | None) -> bool:
    """Say whether a key's name is its own; so it is of one that is new."""
    return row is None or (row.replaced_by is None and row.revoked is None)


def _outcome(known: sql.Row[Any] | None, key: StoredKey, row: dict[str, Any]) -> str:
    if known is None:
        return "created"
    if known.digest != key.digest:
        raise KeyRefusedError(f"{key.name}: the id {key.id} belongs to another key")
    return "unchanged" if all(getattr(known, name) == row[name] for name in _CHANGEABLE) else "changed"


def _row_of(key: StoredKey) -> dict[str, Any]:
    return dataclasses.asdict(key) | {"scopes": " ".join(sorted(key.scopes)), "caller": key.caller or key.id}


def _key_of(row: dict[str, Any]) -> StoredKey:
    return StoredKey(**row | {"scopes": frozenset(row["scopes"].split())})


def _engine(url: str, patience: float) -> AsyncEngine:
    address = sql.make_url(url)
    options: dict[str, Any] = {"pool_size": _CONNECTIONS, "max_overflow": 0, "pool_timeout": patience}
    if address.get_backend_name() == "sqlite":
        options["async_creator"] = lambda: _open_file(address.database or "", patience)
    elif address.query.keys() - _options_of_asyncpg() or not 0 < (address.port or 1) <= _LAST_PORT:
        raise ArgumentError(_NO_ADDRESS)
    else:
        options["connect_args"] = {"timeout": patience}
    return create_async_engine(address, pool_pre_ping=True, hide_parameters=True, **options)


def _options_of_asyncpg() -> set[str]:
    return {*inspect.signature(asyncpg.connect).parameters, "prepared_statement_cache_size"}


async def _open_file(path: str, patience: float) -> aiosqlite.Connection:
    """Open SQLite's file, its owner's alone if it is new; wait up to `patience` seconds for another's lock."""
    with suppress(OSError):  # which SQLite will tell in its own words
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = aiosqlite.connect(path, timeout=patience)
    connection._thread.daemon = True  # noqa: SLF001  as below; a process whose end is cut short does not wait for it
    try:
        return await connection
    except BaseException:
        # Its thread still has a word for this loop, and aiosqlite does not wait for it.
        await asyncio.to_thread(connection._thread.join)  # noqa: SLF001  there is no public name
        raise
