"""The commands `migrate` and `keys create|list|show|revoke|rotate|import`, on the database of PROXY_DATABASE_URL.

A new key is printed once and kept nowhere; what was done goes into the audit log.
"""

import argparse
import asyncio
import dataclasses
import getpass
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from proxy import audit
from proxy.auditfile import configure_audit
from proxy.credentials import KeyParts, make_key, parse_key
from proxy.environment import SettingsError, load_key_settings
from proxy.keys import parse_import, read_entry
from proxy.logs import JsonFormatter
from proxy.operations import IMPERSONATE, USUAL_SCOPES
from proxy.outages import KeyStoreDown
from proxy.settings import MIGRATE_FIRST, KeySettings
from proxy.storedkeys import KeyRefusedError, StoredKey

if TYPE_CHECKING:
    from proxy.keystore import SqlKeyStore
    from proxy.notices import Notices

PATIENCE: Final = 30.0
DAY: Final = 86_400
_END_OF_TIME: Final = 253_402_300_799
"""The last second of the year 9999; a key may be made to live longer, and what cannot be written as a date is this."""
_COLUMNS: Final = ("id", "name", "state", "tier", "rate", "created", "expires", "last_used", "created_by", "scopes")
_TIMES: Final = frozenset({"created", "expires", "last_used", "grace_ends", "revoked"})

type Command = Callable[[SqlKeyStore, argparse.Namespace, int], Coroutine[Any, Any, None]]
type Parsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001  argparse has no public name for it


def add_commands(
    commands: Parsers, keys: Parsers, *, scopes: Callable[[str], frozenset[str]], seconds: Callable[[str], int]
) -> None:
    """Add `migrate` to `commands` and the others to `keys`; `scopes` and `seconds` read what people write."""
    text = "make the key store's schema, or bring it up to date"
    commands.add_parser("migrate", help=text, description=text).set_defaults(command=_running(migrate))
    made = _add(keys, "create", create, "make a key and print it, once")
    made.add_argument("--name", required=True)
    made.add_argument(
        "--scopes", type=scopes, default=USUAL_SCOPES, help=f"separated by commas (all but {IMPERSONATE})"
    )
    made.add_argument("--expires", type=seconds, metavar="90d", help="s, m, h or d (never)")
    made.add_argument("--rate", metavar="600/minute", help="instead of PROXY_RATE_LIMIT")
    made.add_argument("--tier", default="default")
    listed = _add(keys, "list", list_keys, "print the keys that work")
    listed.add_argument("--all", action="store_true", help="those that no longer do, too")
    shown = _add(keys, "show", show, "print all that is known of a key")
    revoked = _add(keys, "revoke", revoke, "end a key, or every key of a name, within 5 seconds")
    rotated = _add(keys, "rotate", rotate, "make a key's successor, which owns the same threads; print it, once")
    rotated.add_argument("--grace", type=seconds, default=DAY, metavar="24h", help="the old one works on so long (24h)")
    rotated.add_argument("--expires", type=seconds, metavar="90d", help="(as long as the old one was made for)")
    brought = _add(keys, "import", import_keys, "write the keys of a file: [[keys]] in TOML, or digest lines")
    brought.add_argument("file", type=argparse.FileType(), help="- for standard input")
    for parser in (shown, revoked, rotated):
        parser.add_argument("key", metavar="NAME|ID")
    for parser in (made, revoked, rotated, brought):
        parser.add_argument("--by", type=_person, default=_user(), help="who does it (the user of this system)")


async def migrate(store: "SqlKeyStore", _: argparse.Namespace, __: int) -> None:
    """Bring the schema up to date."""
    await store.migrate()
    _say("The schema is up to date.")


async def create(store: "SqlKeyStore", options: argparse.Namespace, now: int) -> None:
    """Make a key and print it."""
    text, parts = _new_key()
    key = dataclasses.replace(
        read_entry(
            name=options.name,
            digest=f"sha256:{parts.id}:{parts.digest}",
            scopes=options.scopes,
            tier=options.tier,
            rate=options.rate,
        ),
        expires=now + options.expires if options.expires else None,
        created=now,
        created_by=options.by,
        caller=parts.id,
    )
    await store.add([key])
    audit.write("key.created", key_id=key.id, name=key.name, scopes=sorted(key.scopes), by=options.by)
    _print_new(text, key, now, as_json=options.json)


async def list_keys(store: "SqlKeyStore", options: argparse.Namespace, now: int) -> None:
    """Print the keys that work, or all."""
    _print([key for key in await store.all_keys() if options.all or not key.refusal_at(now)], now, as_json=options.json)


async def show(store: "SqlKeyStore", options: argparse.Namespace, now: int) -> None:
    """Print one key, or every one of a name, with all there is to know."""
    keys = await store.matching(options.key)
    if options.json:
        _print(keys, now, as_json=True)
    else:
        for key in keys:
            _say("\n".join(f"{name:<12} {_plain(value)}" for name, value in _fields(key, now).items()) + "\n")


async def revoke(store: "SqlKeyStore", options: argparse.Namespace, now: int) -> None:
    """End what is named, those still in a grace included."""
    ended: list[StoredKey] = []
    # Again until none is left: a rotation may have made a successor since they were read, and makes none once they end.
    while keys := [key for key in await store.matching(options.key) if key.revoked is None]:
        await store.revoke([key.id for key in keys], now)
        for key in keys:
            audit.write("key.revoked", key_id=key.id, name=key.name, by=options.by)
        ended += [dataclasses.replace(key, revoked=now) for key in keys]
    _print(ended, now, as_json=options.json)


async def rotate(store: "SqlKeyStore", options: argparse.Namespace, now: int) -> None:
    """Make a successor; old and new work until the grace ends."""
    current = [key for key in await store.matching(options.key) if key.replaced_by is None and key.revoked is None]
    if len(current) != 1:
        raise KeyRefusedError(f"{options.key}: the key was rotated or revoked before")
    (old,) = current
    text, parts = _new_key()
    lifetime = options.expires or (old.expires - old.created if old.expires is not None else None)
    new = dataclasses.replace(
        old,
        id=parts.id,
        digest=parts.digest,
        created=now,
        created_by=options.by,
        expires=now + lifetime if lifetime is not None else None,
        last_used=None,
    )
    await store.rotate(old, new, grace_ends=now + options.grace)
    ends = _time(now + options.grace)
    audit.write("key.rotated", key_id=old.id, name=old.name, replaced_by=new.id, grace_ends=ends, by=options.by)
    _print_new(text, new, now, as_json=options.json)


async def import_keys(store: "SqlKeyStore", options: argparse.Namespace, now: int) -> None:
    """Write the keys of a file; what is not in it stays."""
    text = options.file.read()
    keys = [dataclasses.replace(key, created=now, created_by=options.by) for key in parse_import(text)]
    outcomes = await store.add(keys)
    for key in keys:
        if outcomes[key.id] != "unchanged":
            audit.write(f"key.{outcomes[key.id]}", key_id=key.id, name=key.name, imported="yes", by=options.by)
    if options.json:
        _say(json.dumps(outcomes))
    else:
        _say("\n".join(f"{key.id} {key.name}: {outcomes[key.id]}" for key in keys))


_CHANGING: Final[frozenset[Command]] = frozenset({create, revoke, rotate, import_keys})


def _add(parsers: Parsers, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser = parsers.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(command=_running(command))
    return parser


def _running(command: Command) -> Callable[[argparse.Namespace], int]:
    """Give what runs a command on the store; a fault becomes a sentence and the status 1."""

    def run(options: argparse.Namespace) -> int:
        settings = load_key_settings(os.environ)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
        audit.log.handlers = [handler]
        configure_audit(settings.audit_file)
        try:
            asyncio.run(_perform(command, settings, options))
        except (KeyRefusedError, ValueError) as error:
            raise SettingsError([str(error)]) from error
        except KeyStoreDown as problem:
            raise SettingsError([f"PROXY_DATABASE_URL: the database does not answer: {problem.reason}"]) from problem
        return 0

    return run


async def _perform(command: Command, settings: KeySettings, options: argparse.Namespace) -> None:
    from proxy.keystore import SqlKeyStore  # noqa: PLC0415  `serve` knows these commands too, without a database

    try:
        store = SqlKeyStore(settings.database_url.get_secret_value(), patience=PATIENCE)
    except ValueError as error:
        raise SettingsError([f"PROXY_DATABASE_URL: {error}"]) from error
    try:
        if command is not migrate and not await store.is_migrated():
            raise KeyRefusedError(MIGRATE_FIRST)
        try:
            await command(store, options, int(time.time()))
        finally:  # what failed may have changed something before
            if command in _CHANGING and settings.redis_url is not None:
                from proxy.notices import Notices  # noqa: PLC0415  as above, without Redis

                await _announce(Notices(settings.redis_url.get_secret_value(), prefix=settings.redis_prefix))
    finally:
        await store.close()


async def _announce(notices: "Notices") -> None:
    """Have every proxy see at once what was done. They will see it anyway, so nothing fails here."""
    try:
        if failure := await notices.announce():
            print(f"Redis did not take the news ({failure}): proxies see it within 5 seconds.", file=sys.stderr)
    finally:
        await notices.close()


def _new_key() -> tuple[str, KeyParts]:
    text = make_key(secrets.choice)
    parts = parse_key(text)
    assert parts is not None  # noqa: S101  we made it
    return text, parts


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, ImportError, KeyError):
        return f"uid {os.getuid()}"


def _person(text: str) -> str:
    if not text.isprintable() or not 0 < len(text) <= 255:  # noqa: PLR2004  the column's length
        raise argparse.ArgumentTypeError("must be printable text")
    return text


def _fields(key: StoredKey, now: int) -> dict[str, object]:
    """Give what people may know of a key; the digest is nobody's business."""
    fields: dict[str, object] = dataclasses.asdict(key) | {"scopes": sorted(key.scopes)}
    del fields["digest"], fields["changed"]
    fields |= {name: _time(value) for name, value in fields.items() if name in _TIMES and isinstance(value, int)}
    in_grace = "in grace" if key.grace_ends is not None else "works"
    return {"id": key.id, "name": key.name, "state": key.refusal_at(now).removeprefix("key ") or in_grace} | fields


def _print_new(text: str, key: StoredKey, now: int, *, as_json: bool) -> None:
    if as_json:
        _say(json.dumps({"key": text} | _fields(key, now)))
    else:
        _say(f"{text}\n")
        _print([key], now, as_json=False)


def _print(keys: Sequence[StoredKey], now: int, *, as_json: bool) -> None:
    rows = [_fields(key, now) for key in keys]
    if as_json:
        _say(json.dumps(rows))
        return
    table = [[name.upper() for name in _COLUMNS], *([_plain(row[name]) for name in _COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        _say("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return "-" if value is None or value == "" else str(value)


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(min(max(seconds, 0), _END_OF_TIME), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _say(text: str) -> None:
    print(text)
