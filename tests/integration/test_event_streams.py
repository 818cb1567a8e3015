"""Streams as server-sent events, and every end that one can have: a real proxy, an upstream that is told what to do."""

import asyncio
import gzip
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from httpx_sse import aconnect_sse

from tests.support.events import Event, comments, parse_events
from tests.support.front import EVENTS, RUN, client_of, ended, proxy_before
from tests.support.principals import Principals
from tests.support.proxy import Proxy
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, RawUpstream, Talk, answer, chunk

LINES = [b'{"event":"message","n":%d}' % number for number in range(3)]
BODY = b"".join(line + b"\n" for line in LINES)
FAILED = b'{"event":"error","state":{"secret":"hunter2"},"data":{"reason":"hunter2"}}\n'
SHORT = {
    "PROXY_HEARTBEAT_SECONDS": "0.1",
    "PROXY_MAX_LINE_BYTES": "2000",
    "PROXY_FIRST_BYTE_TIMEOUT_SECONDS": "0.5",
    "PROXY_IDLE_TIMEOUT_SECONDS": "0.5",
    "PROXY_TOTAL_TIMEOUT_SECONDS": "2",
    "PROXY_RATE_LIMIT": "off",
    "PROXY_POOL_IDLE_CONNECTIONS": "0",  # each talk has one connection
}


@dataclass
class House:
    """A running proxy with short deadlines; `talk` is what its upstream does next."""

    proxy: Proxy
    upstream: RawUpstream
    principals: Principals
    talk: Talk

    async def events(self, path: str = "/agent/stream") -> tuple[httpx.Response, list[Event]]:
        """Ask for events and read the whole stream; raises if it is cut."""
        async with client_of(self.proxy, self.principals, **EVENTS) as client:
            response = await client.post(path, json=RUN)
        return response, parse_events(response.content)

    async def end_of(self, response: httpx.Response) -> str:
        """Give the end that was logged for an answer."""
        line = await ended(self.proxy, "stream", request_id=response.headers["x-request-id"])
        return str(line["end"])


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """Run it."""
    directory, principals = tmp_path_factory.mktemp("proxy"), Principals()

    async def talk(line: Line) -> None:
        await running.talk(line)

    async with proxy_before(talk, directory, principals, **SHORT) as (proxy, upstream):
        running = House(proxy, upstream, principals, talk)
        yield running


def saying(*parts: bytes, then: str = "gone") -> Talk:
    """Answer with these bytes, and then wait, close or reset."""

    async def talk(line: Line) -> None:
        await line.request()
        for part in parts:
            await line.write(part)
        if then == "gone":
            await line.gone()
        elif then == "reset":
            await asyncio.sleep(0.05)  # what was written has to arrive first, for a reset overtakes it
            line.reset()

    return talk


async def test_each_line_is_an_event_and_then_there_is_an_end(house: House) -> None:
    """Names, bytes and numbers; the type says what it is."""
    house.talk = saying(CHUNKED_HEAD, chunk(BODY), LAST_CHUNK)
    response, events = await house.events()

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert [(event.name, event.data.encode()) for event in events[:-1]] == [("message", line) for line in LINES]
    assert (events[-1].name, events[-1].data) == ("done", '{"end":"done"}')
    assert [event.last_id for event in events] == [f"{response.headers['x-request-id']}-{n}" for n in range(1, 5)]
    assert await house.end_of(response) == "done"


async def test_httpx_sse_reads_them(house: House) -> None:
    """A client that people use, with its own Accept."""
    house.talk = saying(CHUNKED_HEAD, chunk(BODY), LAST_CHUNK)
    async with (
        client_of(house.proxy, house.principals) as client,
        aconnect_sse(client, "POST", "/agent/stream", json=RUN) as source,
    ):
        events = [(event.event, event.data.encode()) async for event in source.aiter_sse()]

    assert events == [*(("message", line) for line in LINES), ("done", b'{"end":"done"}')]


async def test_a_quiet_stream_is_kept_alive_from_before_its_first_byte(house: House) -> None:
    """Comments come while not even the sidecar's head is there, and between events; they are no events."""

    async def talk(line: Line) -> None:
        await line.request()
        await asyncio.sleep(0.35)
        await line.write(CHUNKED_HEAD)
        await asyncio.sleep(0.35)
        await line.write(chunk(BODY))
        await asyncio.sleep(0.35)
        await line.write(LAST_CHUNK)

    house.talk = talk
    response, events = await house.events()
    before, _, after = response.content.partition(b"id: ")

    assert len(comments(before)) >= 4
    assert comments(after)
    assert [event.name for event in events] == ["message"] * 3 + ["done"]


async def test_a_length_that_no_longer_holds_is_not_passed_on(house: House) -> None:
    """An error line made safe has another length than it had; an answer that has no body has none (RFC 9110 §8.6)."""
    async with client_of(house.proxy, house.principals) as client:
        house.talk = saying(answer(LINES[0] + b"\n" + FAILED, "content-type: text/event-stream"))
        failed = await client.post("/agent/stream", json=RUN)
        house.talk = saying(b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n")
        empty = await client.post("/agent/stream", json=RUN)

    assert failed.content.startswith(LINES[0] + b"\n")
    assert b"hunter2" not in failed.content
    assert "content-length" not in failed.headers
    assert (empty.status_code, empty.headers.get("content-length")) == (204, None)
    assert await house.end_of(empty) == "done"


async def test_a_failed_run_is_told_once_and_not_why(house: House) -> None:
    """Both of the sidecar's error lines become the one terminal event."""
    house.talk = saying(CHUNKED_HEAD, chunk(LINES[0] + b"\n" + FAILED + FAILED), LAST_CHUNK)
    response, events = await house.events()

    assert [event.name for event in events] == ["message", "error"]
    assert json.loads(events[-1].data)["data"]["code"] == "upstream_error"
    assert b"hunter2" not in response.content
    assert await house.end_of(response) == "upstream_error"


ENDS = {
    "fin": (saying(CHUNKED_HEAD, chunk(BODY), then="close"), "upstream_cut", 3),
    "rst": (saying(CHUNKED_HEAD, chunk(BODY), then="reset"), "upstream_cut", 3),
    "a line that is cut": (saying(CHUNKED_HEAD, chunk(BODY + b'{"event":"mess'), then="close"), "upstream_cut", 3),
    "stall": (saying(CHUNKED_HEAD, chunk(BODY)), "idle_deadline", 3),
    "no head": (saying(), "first_byte_deadline", 0),
    "no end of heads": (saying(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"), "first_byte_deadline", 0),
    "garbage": (saying(CHUNKED_HEAD, chunk(BODY), b"no chunk\r\n"), "upstream_malformed", 3),
    "a long line": (saying(CHUNKED_HEAD, chunk(BODY), chunk(b"x" * 2001)), "line_too_long", 3),
}


@pytest.mark.parametrize("how", ENDS)
async def test_an_end_that_is_not_good_is_the_last_event(house: House, how: str) -> None:
    """Whatever was whole arrives, then one error event with the end as its code, and the log says the same."""
    house.talk, end, whole = ENDS[how]
    response, events = await house.events()

    assert response.status_code == 200
    assert [event.name for event in events] == ["message"] * whole + ["error"]
    assert json.loads(events[-1].data)["data"]["code"] == end
    assert await house.end_of(response) == end


async def test_the_total_deadline_ends_a_stream_that_goes_on(house: House) -> None:
    """A run that always says something is ended too."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(CHUNKED_HEAD)
        while True:
            await line.write(chunk(LINES[0] + b"\n"))
            await asyncio.sleep(0.2)

    house.talk = talk
    response, events = await house.events()

    assert json.loads(events[-1].data)["data"]["code"] == "total_deadline"
    assert await house.end_of(response) == "total_deadline"


async def test_an_error_behind_heartbeats_is_an_event(house: House) -> None:
    """The status was sent with the first comment, so what would have been a 500 is the last event."""

    async def talk(line: Line) -> None:
        await line.request()
        await asyncio.sleep(0.25)
        await line.write(answer(b'{"error":"hunter2"}', status="500 Internal Server Error"))

    house.talk = talk
    response, events = await house.events()

    assert response.status_code == 200
    assert [json.loads(event.data)["data"]["code"] for event in events] == ["upstream_error"]
    assert b"hunter2" not in response.content


async def test_an_error_before_any_heartbeat_keeps_its_status(house: House) -> None:
    """Nothing is translated that is no stream."""
    house.talk = saying(answer(b"{}", "content-type: application/json", status="422 Unprocessable Content"))
    response, _ = await house.events()

    assert (response.status_code, response.content) == (422, b"{}")
    assert response.headers["content-type"] == "application/json"


OWN = b": hello\r\n\r\nevent: x\r\ndata: 1\r\n\r\nevent: error\ndata: theirs\n\n"


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_what_is_events_already_passes_untouched(house: House, size: int) -> None:
    """An upstream that sends server-sent events keeps its own, with the end they have."""
    parts = [chunk(OWN[at : at + size]) for at in range(0, len(OWN), size)]
    house.talk = saying(CHUNKED_HEAD, b"".join(parts), LAST_CHUNK)
    response, _ = await house.events()

    assert response.content == OWN


async def test_no_heartbeat_falls_into_somebody_elses_event(house: House) -> None:
    """A stream that is not framed here may pause in the middle of a line."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.write(CHUNKED_HEAD + chunk(b"event: x\nda"))
        await asyncio.sleep(0.3)
        await line.write(chunk(b"ta: 1\n\n") + LAST_CHUNK)

    house.talk = talk
    response, _ = await house.events()

    assert response.content == b"event: x\ndata: 1\n\n"


async def test_what_is_compressed_passes_untouched(house: House) -> None:
    """Nobody asked the sidecar to, so nothing here takes it apart."""
    packed = gzip.compress(BODY)
    head = CHUNKED_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    house.talk = saying(head, chunk(packed), LAST_CHUNK)
    response, _ = await house.events()

    assert response.content == BODY  # httpx has unpacked it
    assert response.headers["content-encoding"] == "gzip"


async def test_trailers_are_nobodys(house: House) -> None:
    """Fields after the last chunk do not reach the stream."""
    house.talk = saying(CHUNKED_HEAD, chunk(BODY), b"0\r\nx-trailer: hunter2\r\n\r\n")
    response, events = await house.events()

    assert len(events) == 4
    assert b"hunter2" not in response.content


@pytest.mark.parametrize(
    ("body", "label"),
    [(BODY, "application/x-ndjson"), (OWN, "text/event-stream"), (b"", "text/event-stream")],
)
async def test_agentflows_typescript_client_gets_lines(house: House, body: bytes, label: str) -> None:
    """Its Accept, its way of splitting: by newline, blank ones left out, each parsed; the label tells what they are."""
    house.talk = saying(CHUNKED_HEAD, *([chunk(body)] if body else []), LAST_CHUNK)
    accept = {"Accept": "application/x-ndjson, application/json"}
    async with client_of(house.proxy, house.principals, **accept) as client:
        text, events = "", []
        async with client.stream("POST", "/agent/v1/graph/stream", json=RUN) as response:
            async for part in response.aiter_text():
                *lines, text = (text + part).split("\n")
                events += [json.loads(line) for line in lines if line.strip() and body is BODY]

    assert response.headers["content-type"] == label
    assert [event["n"] for event in events] == ([0, 1, 2] if body is BODY else [])


def until_stopped() -> Callable[[Line], Awaitable[None]]:
    """Make a sidecar whose streams end when it is asked to stop, whosever they are."""
    stopping = asyncio.Event()

    async def talk(line: Line) -> None:
        request = await line.request()
        if b"/v1/graph/stop" in request:
            stopping.set()
            await line.write(answer(b"{}"))
        else:
            await line.write(CHUNKED_HEAD + chunk(BODY))
            await stopping.wait()
            await line.write(LAST_CHUNK)

    return talk


async def test_a_run_that_was_stopped_says_so(house: House) -> None:
    """Its caller asked for it: the end is no failure, and not the usual one either."""
    house.talk = until_stopped()
    run = {"text": "hi", "thread_id": "stopped"}
    async with (
        client_of(house.proxy, house.principals, **EVENTS) as client,
        client.stream("POST", "/agent/stream", json=run) as response,
    ):
        parts = response.aiter_raw()
        body = await anext(parts)
        await client.post("/agent/v1/graph/stop", json={"thread_id": "stopped"})
        body += b"".join([part async for part in parts])

    assert [event.name for event in parse_events(body)] == ["message"] * 3 + ["stopped"]
    assert await house.end_of(response) == "stopped"


async def test_a_stop_of_somebody_else_is_not_this_runs(house: House) -> None:
    """Another caller's thread of the same name is another thread."""
    house.talk = until_stopped()
    other = {"Authorization": f"Bearer {house.principals.token('mallory')}"}
    async with (
        client_of(house.proxy, house.principals, **EVENTS) as client,
        client.stream("POST", "/agent/stream", json={"text": "hi", "thread_id": "mine"}) as response,
    ):
        parts = response.aiter_raw()
        await anext(parts)
        await client.post("/agent/v1/graph/stop", json={"thread_id": "mine"}, headers=other)
        rest = b"".join([part async for part in parts])

    assert parse_events(rest)[-1].name == "done"
    assert await house.end_of(response) == "done"


async def test_a_shutdown_says_why_and_when_to_come_again(tmp_path: Path) -> None:
    """A stream that outlives the grace ends with an event, not with a cut, and the process ends in time."""
    principals = Principals()
    async with (
        proxy_before(saying(CHUNKED_HEAD, chunk(BODY)), tmp_path, principals, PROXY_GRACE_SECONDS="1") as (proxy, _),
        client_of(proxy, principals, **EVENTS) as client,
    ):
        body = b""
        async with client.stream("POST", "/agent/stream", json=RUN) as response:
            async for part in response.aiter_raw():
                if not body:
                    proxy.process.send_signal(signal.SIGTERM)
                body += part
        status = await asyncio.to_thread(proxy.process.wait, 4)

        assert parse_events(body)[-1].name == "error"
        assert json.loads(parse_events(body)[-1].data)["data"]["code"] == "shutdown"
        assert b"\nretry: 1000\n" in body
        assert status == 0
        assert (await ended(proxy, "stream"))["end"] == "shutdown"
