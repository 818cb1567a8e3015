"""The commands for keys, as an operator and as his scripts meet them, and the page that tells of them."""

import dataclasses
import json
import re
import stat
import subprocess
import sys
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path

import pytest

from proxy import keycommands
from proxy.credentials import make_key, parse_key
from proxy.keystore import SqlKeyStore
from tests.support.commands import Operator
from tests.support.proxy import ProxyStoppedError, start_proxy

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    """Give an operator before a migrated store."""
    operator = Operator(f"sqlite+aiosqlite:///{tmp_path}/keys.db", tmp_path)
    assert operator.run("migrate").returncode == 0
    return operator


def test_every_command_of_the_page_does(tmp_path: Path) -> None:
    """What docs/keys.md says to type works as typed, from its first line to its last."""
    commands = re.findall(r"^\$ (.+)$", PAGE.read_text(), re.MULTILINE)
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"

    done = subprocess.run(
        ["/bin/sh", "-eu"],
        input="\n".join(commands),
        cwd=tmp_path,
        env={"PATH": path, "HOME": str(tmp_path), "USER": "olga"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert len(commands) >= 12
    assert done.returncode == 0, done.stderr
    written = [json.loads(line)["event"] for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert written == [
        *("key.created", "key.created", "key.rotated", "key.revoked", "key.revoked", "key.created", "key.created"),
    ]
    assert done.stderr == ""


def test_a_key_is_printed_once(operator: Operator) -> None:
    """The key is in what `create` prints, and in nothing that any later command, the store or the audit log has."""
    made = operator.keys("create", "--name", "billing", "--expires", "90d", "--rate", "600/minute", "--tier", "gold")
    parts = parse_key(made["key"])
    assert parts is not None
    later = [operator.run("keys", *words).stdout for words in (["list"], ["show", "billing"], ["list", "--json"])]

    assert (made["rate"], made["tier"], made["created_by"]) == ("600/minute", "gold", "olga")
    for text in (*later, operator.audit.read_text(), (operator.directory / "keys.db").read_bytes().decode("latin-1")):
        assert made["key"] not in text
        assert made["key"].split("_")[2] not in text
    assert all(parts.digest not in text for text in (*later, operator.audit.read_text()))
    assert all("billing" in text for text in later)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["create", "--name", "a b"], "name: "),
        (["create", "--name", "a", "--rate", "often"], "rate: "),
        (["create", "--name", "a", "--tier", ""], "tier: "),
        (["show", "nobody"], "nobody: there is no such key"),
        (["revoke", "nobody"], "nobody: there is no such key"),
        (["rotate", "nobody"], "nobody: there is no such key"),
        (["import", "-"], "keys: Field required"),
    ],
)
def test_a_refusal_is_a_sentence(operator: Operator, words: list[str], told: str) -> None:
    """What cannot be done is told in one line, with status 1, and nothing is audited."""
    done = operator.run("keys", *words)

    assert (done.returncode, done.stdout) == (1, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert operator.audit.read_text() == ""


def test_a_revoked_key_is_not_rotated(operator: Operator) -> None:
    """A key that has ended has no successor."""
    operator.keys("create", "--name", "a")
    operator.keys("revoke", "a")

    done = operator.run("keys", "rotate", "a")

    assert done.returncode == 1
    assert "was rotated or revoked before" in done.stderr


def test_no_store_is_told_as_such(tmp_path: Path) -> None:
    """A command says which variable to set, that nobody answers, or which command to run first."""
    told = [
        Operator(url, tmp_path).run("keys", "list").stderr
        for url in ("", "x", "postgresql+asyncpg://proxy@127.0.0.1:1/x", f"sqlite+aiosqlite:///{tmp_path}/new.db")
    ]

    for text, part in zip(
        told,
        (
            "is required, as sqlite+aiosqlite:///<file> or ",
            "must be sqlite",
            "does not answer",
            "run: agentflow-proxy migrate",
        ),
        strict=True,
    ):
        assert "PROXY_DATABASE_URL: " in text
        assert part in text


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://user:pa@ss:s3cretword@127.0.0.1/x",
        "postgresql+asyncpg://user:s3cretword@127.0.0.1:99999/x",
        "postgresql+asyncpg://user:s3cretword@127.0.0.1:1/x?sslmode=require",
    ],
)
def test_an_address_that_cannot_be_read_is_told_without_its_password(tmp_path: Path, url: str) -> None:
    """An @ in the password, a port that is none, libpq's options: one sentence, and no word of the address."""
    done = Operator(url, tmp_path).run("migrate")

    assert done.returncode == 1
    assert done.stderr.startswith("PROXY_DATABASE_URL: is no address of a database")
    assert "s3cretword" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_proxy_does_not_start_before_its_schema(tmp_path: Path) -> None:
    """It says which command to run."""
    operator = Operator(f"sqlite+aiosqlite:///{tmp_path}/keys.db", tmp_path)

    with pytest.raises(ProxyStoppedError, match="run: agentflow-proxy migrate"):
        start_proxy(tmp_path, "http://127.0.0.1:9", "s" * 48, **operator.environment())


def test_what_is_imported_twice_is_there_once(operator: Operator) -> None:
    """A file of digests can be imported by every run of a pipeline; only what differs is written and audited."""
    parts = parse_key(make_key(lambda alphabet: alphabet[7]))
    assert parts is not None
    lines = [f"sha256:{parts.id}:{parts.digest} reports {scopes}" for scopes in ("agent:invoke", "agent:stream")]

    outcomes = []
    for line in (lines[0], lines[0], lines[1]):
        done = operator.run("keys", "import", "-", "--json", text=line)
        outcomes.append(json.loads(done.stdout)[parts.id])

    assert outcomes == ["created", "unchanged", "changed"]
    assert [line["event"] for line in operator.audited()] == ["key.created", "key.changed"]


def test_the_file_of_keys_is_its_owners_alone(operator: Operator) -> None:
    """Whoever shares the machine cannot read whose keys there are, whatever the umask lets other files be."""
    assert stat.S_IMODE((operator.directory / "keys.db").stat().st_mode) == 0o600


def test_a_key_that_outlives_the_calendar_is_still_printed(operator: Operator) -> None:
    """What was made is never lost for want of a way to write its date, and can be listed."""
    made = operator.keys("create", "--name", "a", "--expires", "9999999d")
    heir = operator.keys("rotate", "a", "--grace", "9999999d")
    digest = f"sha256:AAAAAAAAAAAA:{1:064}"
    entry = f'[[keys]]\nname = "b"\ndigest = "{digest}"\nscopes = []\nexpires = '
    for expires in ("9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"):
        assert operator.run("keys", "import", "-", text=entry + expires).returncode == 0
        assert "AAAAAAAAAAAA" in operator.run("keys", "list", "--all").stdout

    assert made["expires"] == heir["expires"] == "9999-12-31T23:59:59Z"
    assert parse_key(heir["key"]) is not None
    assert [line["event"] for line in operator.audited()][:2] == ["key.created", "key.rotated"]


async def test_a_successor_made_meanwhile_is_revoked_too(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever revokes a name ends all its keys, one included that a rotation made between the reading and the end."""
    operator.keys("create", "--name", "a")
    store = SqlKeyStore(operator.url)
    revoke = store.revoke

    async def rotated_first(key_ids: Collection[str], now: int) -> None:
        monkeypatch.setattr(store, "revoke", revoke)
        (old,) = await store.matching("a")
        heir = dataclasses.replace(old, id="H" * 12, digest="5" * 64)
        await store.rotate(old, heir, grace_ends=now + 100)
        await revoke(key_ids, now)

    monkeypatch.setattr(store, "revoke", rotated_first)
    try:
        await keycommands.revoke(store, Namespace(key="a", by="olga", json=True), 5)
        keys = await store.all_keys()
    finally:
        await store.close()

    assert [key.revoked for key in keys] == [5, 5]
    assert "H" * 12 in capsys.readouterr().out
