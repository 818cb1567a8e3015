"""Keys that end at once, because the command tells two real proxies over a real Redis; and what Redis cannot do.

Nothing waits by sleeping for readiness: what must happen within a time is polled for until a bound.
"""

import asyncio
import functools
import secrets
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from proxy.credentials import make_key, parse_key
from proxy.keycache import LEAST_SECONDS, POLL_SECONDS
from proxy.keystore import SqlKeyStore
from proxy.notices import Notices
from proxy.storedkeys import StoredKey
from tests.support.commands import Operator
from tests.support.postgres import Postgres, running_postgres
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import Line, answer, raw_upstream
from tests.support.redis import Redis, running_redis

BOUND = 5.0
CHANNEL = "agentflow-proxy:changes"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """Run one server for the module."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def redis() -> Iterator[Redis]:
    """Run an empty server."""
    with running_redis() as server:
        yield server


@pytest.fixture
def operator(postgres: Postgres, redis: Redis, tmp_path: Path) -> Operator:
    """Give an operator before a migrated store, who has a Redis."""
    operator = Operator(postgres.url, tmp_path, redis.url)
    assert operator.run("migrate").returncode == 0
    return operator


async def _agree(line: Line) -> None:
    while await line.request():
        await line.write(answer(b"{}"))


@asynccontextmanager
async def proxies(count: int, operator: Operator) -> AsyncIterator[list[Proxy]]:
    """Run some proxies before one upstream that says {} to everything."""
    settings = {"PROXY_RATE_LIMIT": "off", "PROXY_AUTH_FAILURE_LIMIT": "off", **operator.environment()}
    async with raw_upstream(_agree) as upstream, AsyncExitStack() as stack:
        running = []
        for _ in range(count):
            proxy = await asyncio.to_thread(start_proxy, operator.directory, upstream.url, "s" * 48, **settings)
            stack.push_async_callback(asyncio.to_thread, stop_proxy, proxy.process)
            running.append(proxy)
        yield running


async def seconds_until_ended(proxies: list[Proxy], key: str, end: Callable[[], Awaitable[float]]) -> float:
    """Use a key everywhere, and `end` it, which gives when that was; say how long after it was let in somewhere."""
    last = 0.0

    async def use(client: httpx.AsyncClient) -> None:
        nonlocal last
        while (status := (await client.get("/agent/ping", headers={"X-API-Key": key})).status_code) == 200:
            last = max(last, time.time())
            await asyncio.sleep(0.01)
        assert status == 401

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(httpx.AsyncClient(base_url=each.url)) for each in proxies]
        for client in clients:
            assert (await client.get("/agent/ping", headers={"X-API-Key": key})).status_code == 200
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(use(client))
            ended = await end()
    return last - ended


async def until_logged(proxy: Proxy, event: str) -> None:
    """Wait for a line."""
    async with asyncio.timeout(30):
        while event not in [line["event"] for line in proxy.log_lines()]:
            await asyncio.sleep(0.02)


async def test_a_key_ends_at_once_everywhere_and_without_redis_within_the_bound(
    operator: Operator, redis: Redis
) -> None:
    """With Redis sooner than anybody would have looked; without it as ever; and with it again once it is back.

    The command is run once each way; what is measured does the same as it, without the time that it takes to start.
    """
    store = SqlKeyStore(operator.url)
    keys = [make_key(secrets.choice) for _ in range(6)]
    parts = [parse_key(key) for key in keys]
    ids = [part.id for part in parts if part is not None]
    digests = [part.digest for part in parts if part is not None]
    await store.add(
        StoredKey(key_id, f"key-{key_id}", digest, frozenset({"agent:ping"}), caller=key_id)
        for key_id, digest in zip(ids, digests, strict=True)
    )

    async def revoke(number: int) -> float:
        await store.revoke([ids[number]], int(time.time()))
        ended = time.time()
        notices = Notices(redis.url, prefix="agentflow-proxy")
        assert await notices.announce() == ""
        await notices.close()
        return ended

    async def command(number: int) -> float:
        done = await asyncio.to_thread(operator.run, "keys", "revoke", ids[number])
        said.append((done.returncode, done.stderr))
        (line,) = [
            line for line in operator.audited() if (line["event"], line["key_id"]) == ("key.revoked", ids[number])
        ]
        return datetime.fromisoformat(line["time"]).timestamp()

    said: list[tuple[int, str]] = []
    try:
        async with proxies(2, operator) as running:
            soon = [await seconds_until_ended(running, keys[n], functools.partial(revoke, n)) for n in range(3)]
            soon.append(await seconds_until_ended(running, keys[3], functools.partial(command, 3)))
            redis.kill()
            for proxy in running:
                await until_logged(proxy, "notices.lost")
            late = await seconds_until_ended(running, keys[4], functools.partial(command, 4))
            await asyncio.to_thread(redis.start)
            for proxy in running:
                await until_logged(proxy, "notices.recovered")
            again = await seconds_until_ended(running, keys[5], functools.partial(revoke, 5))
    finally:
        await store.close()

    print(f"let in after its end, with Redis {soon}, without {late}, with it again {again}: seconds")
    assert statistics.median(soon) < POLL_SECONDS / 3
    assert max(*soon, late, again) <= BOUND
    assert said[0][0] == said[1][0] == 0
    assert "Redis" not in said[0][1]
    assert "Redis did not take the news (ConnectionError): proxies see it within 5 seconds." in said[1][1]


async def test_a_notice_holds_nothing_and_is_not_believed(operator: Operator, redis: Redis, postgres: Postgres) -> None:
    """Who listens learns that something changed and no more; who shouts ends no key and cannot load the database."""
    made = await asyncio.to_thread(operator.keys, "create", "--name", "quiet")
    with socket.create_connection(("127.0.0.1", redis.port), 10) as listener:
        listener.sendall(f"SUBSCRIBE {CHANNEL}\r\n".encode())
        async with proxies(1, operator) as (proxy,), httpx.AsyncClient(base_url=proxy.url) as client:
            assert (await client.get("/agent/ping", headers={"X-API-Key": made["key"]})).status_code == 200
            before, began = postgres.statements("FROM key_changes"), time.monotonic()
            with socket.create_connection(("127.0.0.1", redis.port), 10) as liar:
                forged = [b"PUBLISH %b revoke:%b\r\n" % (CHANNEL.encode(), made["id"].encode())] * 5000
                liar.sendall(b"".join(forged))
                received = b""
                while received.count(b"\r\n") < 5000:
                    received += liar.recv(65_536)
            status = (await client.get("/agent/ping", headers={"X-API-Key": made["key"]})).status_code
            async with asyncio.timeout(30):
                while postgres.statements("FROM key_changes") - before < 2:
                    await asyncio.sleep(0.02)
            asked, seconds = postgres.statements("FROM key_changes") - before, time.monotonic() - began
        await asyncio.to_thread(operator.keys, "revoke", "quiet")
        heard = b""
        honest = b"*3\r\n$7\r\nmessage\r\n$%d\r\n%b\r\n$0\r\n\r\n" % (len(CHANNEL), CHANNEL.encode())
        while not heard.endswith(honest):
            heard += listener.recv(65_536)

    print(f"5000 forged notices in {seconds:.2f} s: {asked} readings of the database's changes")
    assert status == 200
    assert asked <= 2 * (seconds / LEAST_SECONDS + 1)
    assert b"quiet" not in heard
