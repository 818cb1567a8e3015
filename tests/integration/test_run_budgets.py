"""What runs cost, on a real Redis: charged whoever leaves, shown and reset by the command; and rates of one's own."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from proxy.credentials import parse_key
from tests.support.callers import ask
from tests.support.events import parse_events
from tests.support.front import EVENTS, RUN, client_of, proxy_before
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, answer, chunk, raw_upstream
from tests.support.redis import Redis, running_redis

SECRET = "the secret of the agent behind, 32+"
DEADLINE = 30.0
LIMITS = '[costs]\nstream = 2\n[[policies]]\nname = "requests"\nrate = "9/100 days"\n'
LIMITS += '[[policies]]\nname = "tokens"\ntokens = "1000/100 days"\n'
TEXT = "x" * 400
BLOCK = {"type": "text", "text": TEXT, "annotations": []}
SAID = {"message_id": "m", "role": "assistant", "content": [BLOCK], "delta": True, "tools_calls": None}
DELTA = json.dumps({"event": "message", "message": SAID}).encode() + b"\n"


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    """Run a Redis."""
    with running_redis() as running:
        yield running


def stream(url: str, credential: str) -> bytes:
    """Write a request for a stream."""
    fields = f"Authorization: Bearer {credential}" if credential.count(".") == 2 else f"X-API-Key: {credential}"
    head = f"POST /agent/stream HTTP/1.1\r\nHost: {url}\r\n{fields}\r\nContent-Type: application/json\r\n"
    return head.encode() + b'Content-Length: 13\r\n\r\n{"text":"hi"}'


def ping(credential: str) -> bytes:
    """Write a ping with a key."""
    return f"GET /agent/ping HTTP/1.1\r\nHost: p.test\r\nX-API-Key: {credential}\r\n\r\n".encode()


def command(environment: dict[str, str], *words: str) -> list[dict[str, object]]:
    """Run `agentflow-proxy limits`, and read its JSON."""
    done = subprocess.run(
        [Path(sys.executable).with_name("agentflow-proxy"), "limits", *words, "--json"],
        env={"PATH": os.defpath, **{name: value for name, value in environment.items() if value}},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: list[dict[str, object]] = json.loads(done.stdout)
    return told


def used(environment: dict[str, str], *words: str) -> dict[object, object]:
    """Give what was used, by policy; each is told once, whatever operations cost."""
    rows = command(environment, "show", *words)
    assert len({row["policy"] for row in rows}) == len(rows)
    return {row["policy"]: row["used"] for row in rows}


def await_true(claim: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + DEADLINE
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


async def test_runs_are_charged_whoever_leaves_and_go_on_through_a_reload(redis: Redis, tmp_path: Path) -> None:
    """A stream that was left in the middle cost what it had written; another outlives SIGHUP, and ends whole."""
    principals, limits, ends = Principals(), tmp_path / "limits.toml", asyncio.Event()
    limits.write_text(LIMITS)

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(CHUNKED_HEAD + chunk(DELTA))
            await ends.wait()
            await line.write(chunk(DELTA) + LAST_CHUNK)

    environment = principals.environment() | {"PROXY_REDIS_URL": redis.url, "PROXY_LIMITS_FILE": str(limits)}
    environment |= {"PROXY_REDIS_TIMEOUT_SECONDS": "5", "PROXY_AGENT_SECRET": SECRET}
    async with raw_upstream(talk) as upstream:
        proxy = await asyncio.to_thread(start_proxy, tmp_path, upstream.url, SECRET, **without_secret(environment))
        try:
            told = await streams(proxy, principals, limits, ends, environment)
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)

    left, finished, reset, body = told
    assert left == {"requests": 2, "tokens": 100}
    assert finished == {"requests": 2, "tokens": 200}
    assert reset == {"requests": 0, "tokens": 0}
    assert body.count(TEXT.encode()) == 2
    assert body.endswith(b"0\r\n\r\n")


async def streams(
    proxy: Proxy, principals: Principals, limits: Path, ends: asyncio.Event, environment: dict[str, str]
) -> tuple[dict[object, object], dict[object, object], dict[object, object], bytes]:
    """Leave one stream, hold another through SIGHUP; give what each has used, what after a reset, and the bytes."""

    async def begin(subject: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        host, _, port = proxy.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(stream("p.test", principals.token(subject)))
        return reader, writer, await reader.readuntil(TEXT.encode())

    def used_by(subject: str) -> dict[object, object]:
        return used(environment, "--principal", f"jwt:{subject}")

    _, writer, _ = await begin("leaving")
    writer.transport.abort()
    await asyncio.to_thread(await_true, lambda: used_by("leaving")["tokens"] != 0)
    left = await asyncio.to_thread(used_by, "leaving")

    reader, writer, first = await begin("staying")
    await asyncio.to_thread(limits.write_text, LIMITS.replace("9/100", "7/100"))
    proxy.process.send_signal(signal.SIGHUP)
    await asyncio.to_thread(await_true, lambda: any(line["event"] == "settings.reloaded" for line in proxy.log_lines()))
    ends.set()
    body = first + await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.transport.abort()
    await asyncio.to_thread(await_true, lambda: used_by("staying")["tokens"] == 200)
    finished = await asyncio.to_thread(used_by, "staying")
    await asyncio.to_thread(command, environment, "reset", "--principal", "jwt:leaving")
    return left, finished, await asyncio.to_thread(used_by, "leaving"), body


def without_secret(environment: dict[str, str]) -> dict[str, str]:
    """Leave out what `start_proxy` gives by itself."""
    return {name: value for name, value in environment.items() if name != "PROXY_AGENT_SECRET"}


async def test_a_stream_ends_where_its_budget_does(redis: Redis, tmp_path: Path) -> None:
    """The sidecar would write for ever: it is hung up on and told to stop, and the caller hears why, as he listens."""
    principals, limits, stopped = Principals(), tmp_path / "limits.toml", list[str]()
    limits.write_text(LIMITS)

    async def talk(line: Line) -> None:
        request = await line.request()
        if b"/v1/graph/stop" in request:
            stopped.append(json.loads(request.partition(b"\r\n\r\n")[2])["thread_id"])
            await line.write(answer(b"{}"))
            return
        await line.write(CHUNKED_HEAD)
        while True:  # until nobody takes it any more
            await line.write(chunk(DELTA))
            await asyncio.sleep(0)

    settings = {"PROXY_REDIS_URL": redis.url, "PROXY_LIMITS_FILE": str(limits), "PROXY_REDIS_TIMEOUT_SECONDS": "5"}
    async with proxy_before(talk, tmp_path, principals, **settings) as (proxy, _):
        as_lines, as_events = (
            client_of(proxy, principals),
            client_of(proxy, principals, **EVENTS, Authorization=f"Bearer {principals.token('bob')}"),
        )
        async with as_lines, as_events, asyncio.timeout(DEADLINE):
            cut = b""
            with pytest.raises(httpx.RemoteProtocolError):
                async with as_lines.stream("POST", "/agent/stream", json=RUN) as response:
                    async for part in response.aiter_raw():
                        cut += part
            events = parse_events((await as_events.post("/agent/stream", json=RUN)).content)
            while len(stopped) < 2:
                await asyncio.sleep(0.01)
            while len(lines := [line for line in proxy.log_lines() if line.get("end") == "budget_spent"]) < 2:
                await asyncio.sleep(0.01)

    assert cut.startswith(DELTA)
    assert (events[0].name, events[-1].name) == ("message", "stopped")
    assert json.loads(events[-1].data)["end"] == "budget_spent"
    assert [(line["status"], line["code"]) for line in lines] == [(200, "budget_spent")] * 2
    assert len(set(stopped)) == 2


async def test_a_keys_own_rate_is_what_it_gets(redis: Redis, tmp_path: Path) -> None:
    """Two with `rate = "2/100 days"`, all others what the policy says; the command tells it as it is counted."""
    principals = Principals()
    narrow, usual = principals.key("narrow"), principals.key("usual")
    principals.entries[0] += 'rate = "2/100 days"\n'
    parts = parse_key(narrow)
    assert parts is not None
    environment = principals.environment() | {"PROXY_REDIS_URL": redis.url, "PROXY_RATE_LIMIT": "4/100 days"}
    environment |= {"PROXY_REDIS_TIMEOUT_SECONDS": "5"}

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")

    async with raw_upstream(talk) as upstream:
        proxy = await asyncio.to_thread(start_proxy, tmp_path, upstream.url, SECRET, **environment)
        try:
            told = [await ask(proxy.url, [ping(key)] * 5) for key in (narrow, usual)]
        finally:
            await asyncio.to_thread(stop_proxy, proxy.process)
    words = ("--principal", f"key:{parts.id}", "--rate", "2/100 days")
    shown = await asyncio.to_thread(command, environment | {"PROXY_AGENT_SECRET": SECRET}, "show", *words)

    assert told == [[200] * 2 + [429] * 3, [200] * 4 + [429]]
    assert [(row["policy"], row["used"], row["amount"]) for row in shown] == [("requests", 2, 2)]
