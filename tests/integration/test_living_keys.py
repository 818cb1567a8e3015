"""Keys that are made, rotated and revoked while two real proxies serve, and a key store that dies under them.

Nothing waits by sleeping for readiness: what must happen within a time is polled for until a bound.
"""

import asyncio
import json
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from proxy.credentials import make_key
from tests.support.commands import Operator
from tests.support.postgres import Postgres, running_postgres
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import Line, answer, raw_upstream

SECRET = "s" * 48
BOUND = 5.0
"""Seconds within which a revocation is true everywhere."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """Run one server for the module."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def operator(postgres: Postgres, tmp_path: Path) -> Operator:
    """Give an operator before a migrated store."""
    operator = Operator(postgres.url, tmp_path)
    assert operator.run("migrate").returncode == 0
    return operator


async def _agree(line: Line) -> None:
    while await line.request():
        await line.write(answer(b"{}"))


@asynccontextmanager
async def proxies(count: int, operator: Operator, **environment: str) -> AsyncIterator[list[Proxy]]:
    """Run some proxies before one upstream that says {} to everything."""
    settings = {
        "PROXY_RATE_LIMIT": "off",
        "PROXY_AUTH_FAILURE_LIMIT": "off",
        "PROXY_KEY_STORE_GRACE_SECONDS": "8",
        **operator.environment(),
        **environment,
    }
    async with raw_upstream(_agree) as upstream, AsyncExitStack() as stack:
        running = []
        for _ in range(count):
            proxy = await asyncio.to_thread(start_proxy, operator.directory, upstream.url, SECRET, **settings)
            stack.push_async_callback(asyncio.to_thread, stop_proxy, proxy.process)
            running.append(proxy)
        yield running


@dataclass
class Load:
    """Callers that ask again and again with `key`, which may be exchanged; every status that came back is counted."""

    proxies: list[Proxy]
    key: str
    statuses: dict[int, int] = field(default_factory=dict)
    last_let_in: float = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Keep four callers at each proxy as long as the context lasts."""
        async with AsyncExitStack() as stack:
            tasks = []
            for proxy in self.proxies:
                client = await stack.enter_async_context(httpx.AsyncClient(base_url=proxy.url, timeout=20))
                tasks += [asyncio.create_task(self._call(client)) for _ in range(4)]
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(outcome, asyncio.CancelledError), outcome

    async def _call(self, client: httpx.AsyncClient) -> None:
        while True:
            reply = await client.get("/agent/ping", headers={"X-API-Key": self.key})
            self.statuses[reply.status_code] = self.statuses.get(reply.status_code, 0) + 1
            if reply.status_code == 200:
                self.last_let_in = time.time()
            await asyncio.sleep(0.01)

    async def grow(self, status: int, by: int = 20) -> None:
        """Wait until so many more answers of this status have come."""
        goal = self.statuses.get(status, 0) + by
        async with asyncio.timeout(30):
            while self.statuses.get(status, 0) < goal:
                await asyncio.sleep(0.01)


async def status_of(proxy: Proxy, key: str) -> int:
    """Ask once."""
    async with httpx.AsyncClient(base_url=proxy.url, timeout=20) as client:
        return (await client.get("/agent/ping", headers={"X-API-Key": key})).status_code


async def until(proxy: Proxy, path: str, status: int) -> httpx.Response:
    """Poll a public path until it answers so."""
    async with asyncio.timeout(30), httpx.AsyncClient(base_url=proxy.url, timeout=20) as client:
        while (reply := await client.get(path)).status_code != status:
            await asyncio.sleep(0.05)
        return reply


def events(proxy: Proxy) -> list[str]:
    """Give the names of what was logged."""
    return [line["event"] for line in proxy.log_lines()]


async def test_a_key_is_rotated_under_load_and_no_request_is_lost(operator: Operator) -> None:
    """Callers go over from the old key to the new one while both proxies serve: every answer is 200.

    The new key owns the threads of the old one, which a later thread listing would show; both have one namespace.
    """
    made = await asyncio.to_thread(operator.keys, "create", "--name", "rotated")
    async with proxies(2, operator) as running, Load(running, made["key"]).running() as load:
        await load.grow(200)
        new = await asyncio.to_thread(operator.keys, "rotate", "rotated", "--grace", "1h")
        await load.grow(200, by=100)
        load.key = new["key"]
        await load.grow(200, by=100)
        old = [await status_of(proxy, made["key"]) for proxy in running]

    assert set(load.statuses) == {200}
    assert old == [200, 200]
    assert new["caller"] == made["id"]


async def test_a_revoked_key_ends_on_both_proxies_within_the_bound(operator: Operator) -> None:
    """From the moment it is revoked, as the audit log has it, the last request is let in within five seconds."""
    made = await asyncio.to_thread(operator.keys, "create", "--name", "revoked")
    async with proxies(2, operator) as running, Load(running, made["key"]).running() as load:
        await load.grow(200)
        await asyncio.to_thread(operator.keys, "revoke", "revoked")
        async with asyncio.timeout(30):
            while [await status_of(proxy, made["key"]) for proxy in running] != [401, 401]:
                await asyncio.sleep(0.01)
        await load.grow(401, by=200)
    (line,) = [line for line in operator.audited() if line["event"] == "key.revoked"]
    late = load.last_let_in - datetime.fromisoformat(line["time"]).timestamp()

    print(f"the last request was let in {late:.2f} s after the key was revoked")
    assert set(load.statuses) == {200, 401}
    assert late <= BOUND


async def test_a_grace_ends_by_itself(operator: Operator) -> None:
    """The old key stops at the end of its grace; nobody has to revoke it."""
    made = await asyncio.to_thread(operator.keys, "create", "--name", "graced")
    async with proxies(1, operator) as (proxy,):
        before = await status_of(proxy, made["key"])
        new = await asyncio.to_thread(operator.keys, "rotate", "graced", "--grace", "1s")
        async with asyncio.timeout(30):
            while await status_of(proxy, made["key"]) != 401:
                await asyncio.sleep(0.05)

        assert (before, await status_of(proxy, new["key"])) == (200, 200)


async def test_a_store_that_dies_under_load(operator: Operator, postgres: Postgres) -> None:
    """Known keys go on for the grace, then get 503; unknown ones get 503 at once; when it is back, all is as before."""
    made = await asyncio.to_thread(operator.keys, "create", "--name", "survivor")
    other = await asyncio.to_thread(operator.keys, "create", "--name", "latecomer")
    stranger = make_key(secrets.choice)
    async with proxies(1, operator) as (proxy,), Load([proxy], made["key"]).running() as load:
        await load.grow(200)
        await asyncio.to_thread(postgres.kill)
        killed = time.time()
        try:
            async with asyncio.timeout(30):
                while "key_store.lost" not in events(proxy):
                    assert await status_of(proxy, stranger) in (401, 503)
                    await asyncio.sleep(0.01)
            unknown = [await status_of(proxy, key) for key in (other["key"], stranger)]
            statuses_in_grace = set(load.statuses)
            ready_in_grace = (await until(proxy, "/health/ready", 200)).json()
            lost = (await until(proxy, "/health/ready", 503)).json()
            let_in_for = load.last_let_in - killed
            await load.grow(503)
            live = (await until(proxy, "/health/live", 200)).json()
        finally:
            await asyncio.to_thread(postgres.start)
        await until(proxy, "/health/ready", 200)
        await load.grow(200)
        after = [await status_of(proxy, key) for key in (made["key"], other["key"], stranger)]

    print(f"known keys were let in for {let_in_for:.2f} s of a grace of 8 s")
    assert (unknown, statuses_in_grace, set(load.statuses)) == ([503, 503], {200}, {200, 503})
    assert (ready_in_grace, lost, live) == ({"status": "ready"}, {"status": "key_store_down"}, {"status": "live"})
    assert 3 < let_in_for <= 8.5
    assert after == [200, 200, 401]
    told = [event for event in events(proxy) if event.startswith("key_store.")]
    assert told == ["key_store.lost", "key_store.recovered"]


async def test_a_store_that_hangs_is_down_too(operator: Operator, postgres: Postgres) -> None:
    """A database that takes connections and never answers holds nobody up for long, and keeps no known key out."""
    made = await asyncio.to_thread(operator.keys, "create", "--name", "patient")
    stranger = make_key(secrets.choice)
    async with (
        proxies(1, operator, PROXY_KEY_STORE_GRACE_SECONDS="60") as (proxy,),
        Load([proxy], made["key"]).running() as load,
    ):
        await load.grow(200)
        postgres.pause()
        try:
            async with asyncio.timeout(20):
                refused = await status_of(proxy, stranger)
                while "key_store.lost" not in events(proxy):
                    await asyncio.sleep(0.01)
            await load.grow(200)
        finally:
            postgres.resume()
        async with asyncio.timeout(30):
            while await status_of(proxy, stranger) != 401:
                await asyncio.sleep(0.05)

    assert refused == 503
    assert set(load.statuses) == {200}


async def test_a_store_that_hangs_holds_no_process_up_at_its_end(operator: Operator, postgres: Postgres) -> None:
    """An idle connection says goodbye to the server, which would be waited for without end."""
    async with proxies(1, operator) as (proxy,):
        refused = await status_of(proxy, make_key(secrets.choice))
        postgres.pause()
        try:
            proxy.process.send_signal(signal.SIGTERM)
            status = await asyncio.to_thread(proxy.process.wait, 15)
        finally:
            postgres.resume()

    assert (refused, status) == (401, 0)


async def test_guessing_does_not_load_the_database(operator: Operator, postgres: Postgres) -> None:
    """A thousand different keys that were never made, over thirty connections: a bounded number of queries.

    Postgres logs every statement. A proxy makes at most 50 look-ups a second, and none for what it has asked before.
    """
    guesses = [make_key(secrets.choice) for _ in range(1000)]
    async with proxies(1, operator) as (proxy,), httpx.AsyncClient(base_url=proxy.url, timeout=60) as client:
        before, began = postgres.statements("FROM api_keys"), time.monotonic()

        async def guess(part: list[str]) -> set[int]:
            return {(await client.get("/agent/ping", headers={"X-API-Key": key})).status_code for key in part}

        outcomes = await asyncio.gather(*(guess(guesses[n::30]) for n in range(30)))
        seconds, asked = time.monotonic() - began, postgres.statements("FROM api_keys") - before
        await asyncio.gather(*(guess(guesses[n::30]) for n in range(30)))
        repeated = postgres.statements("FROM api_keys") - before - asked

    print(f"1000 guesses in {seconds:.2f} s: {asked} queries; the same again: {repeated}")
    assert set().union(*outcomes) == {401}
    assert 0 < asked <= 50 * seconds + 2
    assert repeated == 0


async def test_the_audit_log_tells_who_did_what_and_no_secret(operator: Operator) -> None:
    """Made, used, rotated, refused, revoked: each is a line with a name; no key, and no digest, is in any log.

    What is no credential is refused too, as is whoever would act for another; nothing of what they wrote is told.
    """
    made = await asyncio.to_thread(operator.keys, "create", "--name", "audited", "--by", "ci")
    stranger, slip = make_key(secrets.choice), secrets.token_urlsafe(24)
    async with proxies(1, operator, PROXY_TRUSTED_HOPS="1") as (proxy,):
        async with httpx.AsyncClient(base_url=proxy.url, timeout=20) as client:
            for address in ("192.0.2.1", "192.0.2.1", "2001:db8::1", "2001:db8::2", "\x9b31m"):
                headers = {"X-API-Key": made["key"], "X-Forwarded-For": address}
                await client.get(
                    "/agent/ping", headers={name: value.encode("latin-1") for name, value in headers.items()}
                )
            await client.get("/agent/ping", headers={"X-API-Key": stranger})
            await client.get("/agent/ping", headers={"Authorization": "Bearer a.b.c"})
            for headers in (
                {"Authorization": f"Basic {slip}"},
                {"Authorization": f"Bearer {slip}", "X-API-Key": made["key"]},
                {"X-API-Key": made["key"], "X-On-Behalf-Of": slip},
                {"X-API-Key": made["key"], "X-On-Behalf-Of": slip},
            ):
                await client.get("/agent/ping", headers=headers | {"X-Forwarded-For": "192.0.2.1"})
        new = await asyncio.to_thread(operator.keys, "rotate", "audited")
        await asyncio.to_thread(operator.keys, "revoke", made["id"])
        log = proxy.log.read_text()
    lines = operator.audited()

    told = [(line["event"], line.get("name"), line.get("by"), line.get("address")) for line in lines]
    assert told[:6] == [
        ("key.created", "audited", "ci", None),
        ("key.used_from_new_address", "audited", None, "192.0.2.1"),
        ("key.used_from_new_address", "audited", None, "2001:db8::1"),
        ("key.used_from_new_address", "audited", None, "\x9b31m"),
        ("key.refused", None, None, "127.0.0.1"),
        ("token.refused", None, None, "127.0.0.1"),
    ]
    assert told[6:9] == [
        ("credential.refused", None, None, "192.0.2.1"),
        ("credential.refused", None, None, "192.0.2.1"),
        ("delegation.refused", "audited", None, "192.0.2.1"),
    ]
    after = [line for line in lines[9:] if line["event"] != "delegation.refused"]  # the minute may have ended between
    assert [(line["event"], line["by"]) for line in after] == [("key.rotated", "olga"), ("key.revoked", "olga")]
    assert [line["reason"] for line in lines if "reason" in line][:5] == [
        "key unknown",
        "tokens are not configured",
        "The Authorization scheme must be Bearer.",
        "Present exactly one credential, once.",
        "This operation needs the scope agent:impersonate.",
    ]
    assert lines[8]["key_id"] == made["id"]
    raw = operator.audit.read_text()
    for secret in (made["key"], new["key"], stranger, made["key"].split("_")[2], stranger.split("_")[2], slip):
        assert secret not in raw + log
    assert raw.replace("\n", "").isprintable()
    assert raw.isascii()
    assert json.loads(raw.splitlines()[0])["key_id"] == made["id"]
    assert operator.audit.stat().st_mode & 0o777 == 0o600


async def test_when_a_key_was_used_last_is_written_when_a_proxy_ends(operator: Operator) -> None:
    """To the minute, in UTC; until then nothing was written on its way."""
    made = await asyncio.to_thread(operator.keys, "create", "--name", "used")
    async with proxies(1, operator) as (proxy,):
        assert await status_of(proxy, made["key"]) == 200
    (shown,) = await asyncio.to_thread(operator.keys, "show", "used")

    assert shown["last_used"] is not None
    assert shown["last_used"].endswith(":00Z")
    assert shown["last_used"] <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
