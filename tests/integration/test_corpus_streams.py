"""The corpus of streams through a real proxy, in each of a stream's forms, however the sidecar cuts its chunks."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.corpus import CORPUS, OWN, PIECES, cut, meant
from tests.support.events import parse_events
from tests.support.front import RUN, client_of, proxy_before
from tests.support.principals import Principals
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, chunk

FORMS = {"as it is": "*/*", "lines": "application/x-ndjson, application/json", "events": "text/event-stream"}


def parts(stream: bytes, how: str) -> Iterator[bytes]:
    """Write a stream as chunks, some of them together."""
    chunks = [chunk(piece) for piece in cut(stream, how) if piece]
    step = 1 + len(chunks) // 40  # a write each would take a minute in all
    for at in range(0, len(chunks), step):
        yield b"".join(chunks[at : at + step])


@pytest.mark.parametrize("form", FORMS)
async def test_the_corpus_passes(form: str, tmp_path: Path) -> None:
    """Byte for byte as lines, and where it is events already; with the same meaning as events."""
    said = b""
    how = ""
    principals = Principals()
    wrong = []

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(CHUNKED_HEAD)
            for part in parts(said, how):
                await line.write(part)
                await asyncio.sleep(0)
            await line.write(LAST_CHUNK)

    async with (
        proxy_before(talk, tmp_path, principals, PROXY_RATE_LIMIT="off") as (proxy, upstream),
        client_of(proxy, principals, Accept=FORMS[form]) as client,
    ):
        for number, (name, said) in enumerate([*CORPUS.items(), *OWN.items()]):
            how = PIECES[number % len(PIECES)]
            response = await client.post("/agent/stream", json=RUN)
            if form == "events" and number < len(CORPUS):
                *events, end = parse_events(response.content)
                passed = [event.data for event in events] == [text for _, text in meant(said)] and end.name == "done"
            else:
                passed = response.content == said
            if not passed or response.status_code != 200:
                wrong.append((name, how, response.status_code, response.content[:100]))
        assert upstream.accepted == 1

    assert wrong == []
