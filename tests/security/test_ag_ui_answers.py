"""What comes back over AG-UI, through a running proxy: no exception's text, and no run that costs nothing."""

from pathlib import Path

import pytest

from tests.support.front import client_of, ended, proxy_before
from tests.support.principals import Principals
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, chunk

PATH = "/agent/v1/ag-ui"
RUN = {"threadId": "t", "runId": "r", "messages": [{"id": "1", "role": "user", "content": "x" * 400}]}
TEXT = b'data: {"type":"TEXT_MESSAGE_CONTENT","messageId":"m","delta":"%b"}\n\n' % (b"x" * 800)
FAILED = b'data: {"type":"RUN_ERROR","message":"password=hunter2","code":"GRAPH_ERROR"}\n\n'


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson", "*/*"])
async def test_a_failed_run_is_told_safely_and_charged(tmp_path: Path, accept: str) -> None:
    """Whatever the client says it accepts; the budget that the run has overdrawn refuses the next."""

    async def talk(line: Line) -> None:
        while await line.request():
            await line.write(CHUNKED_HEAD + chunk(TEXT + FAILED[:30]))
            await line.write(chunk(FAILED[30:]) + LAST_CHUNK)

    principals = Principals()
    settings = {"PROXY_TOKEN_LIMIT": "100/hour", "PROXY_STOP_OVER_BUDGET": "false"}
    async with (
        proxy_before(talk, tmp_path, principals, **settings) as (proxy, _),
        client_of(proxy, principals, Accept=accept) as client,
    ):
        first = await client.post(PATH, json=RUN)
        second = await client.post(PATH, json=RUN)
        line = await ended(proxy, "ag-ui", status=200)

    assert first.content == TEXT + b'data: {"type":"RUN_ERROR","message":"The run failed.","code":"GRAPH_ERROR"}\n\n'
    assert (second.status_code, second.json()["violated-policies"]) == (429, ["tokens"])
    assert line["end"] == "upstream_error"
