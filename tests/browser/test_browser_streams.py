"""What a real browser makes of a stream: `fetch`'s reader, and an EventSource over it, in Chromium."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.browser import browse, origin_of, require_chromium
from tests.support.front import proxy_before
from tests.support.principals import Principals
from tests.support.raw_upstream import CHUNKED_HEAD, LAST_CHUNK, Line, chunk

TEXTS = ["grüße", "漢字", "😀", "a\u2028b", "\ufeff", "x" * 100_000, '{"event":"error"}', "data: x\n\n"]
LINES = [json.dumps({"event": "message", "n": n, "text": text}, ensure_ascii=False) for n, text in enumerate(TEXTS)]
BODY = "".join(line + "\n" for line in LINES).encode()
FAILED = b'{"event":"error","data":{"reason":"hunter2"}}\n'

PAGE = """<!doctype html><meta charset="utf-8"><script>
const token = "TOKEN";
const ask = (text, accept, signal) => fetch("/agent/stream", {
  method: "POST", signal, body: JSON.stringify({text}),
  headers: {"Content-Type": "application/json", "Authorization": "Bearer " + token, "Accept": accept}});

// AgentFlow's own TypeScript client reads so.
async function lines(text) {
  const response = await ask(text, "application/x-ndjson, application/json");
  const reader = response.body.getReader(), decoder = new TextDecoder();
  const found = [];
  let rest = "", cut = false;
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const parts = (rest + decoder.decode(value, {stream: true})).split("\\n");
      rest = parts.pop();
      for (const part of parts) if (part.trim()) found.push(JSON.parse(part));
    }
  } catch (error) { cut = true; }
  return {type: response.headers.get("content-type"), found, cut};
}

// An EventSource that can POST: the standard's parser, over fetch.
class FetchEventSource extends EventTarget {
  constructor(response) { super(); this.response = response; this.lastEventId = ""; }
  async run() {
    const reader = this.response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", name = "", data = [];
    const take = line => {
      if (line === "") {
        if (data.length) this.dispatchEvent(
          new MessageEvent(name || "message", {data: data.join("\\n"), lastEventId: this.lastEventId}));
        name = ""; data = [];
        return;
      }
      const at = line.indexOf(":");
      const field = at < 0 ? line : line.slice(0, at);
      let value = at < 0 ? "" : line.slice(at + 1);
      if (value[0] === " ") value = value.slice(1);
      if (field === "" ) this.comments = (this.comments || 0) + 1;
      else if (field === "event") name = value;
      else if (field === "data") data.push(value);
      else if (field === "id" && !value.includes("\\0")) this.lastEventId = value;
    };
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\\r\\n|\\n|\\r(?=.)/s);
      rest = parts.pop();
      parts.forEach(take);
    }
  }
}

async function events(text) {
  const response = await ask(text, "text/event-stream");
  const source = new FetchEventSource(response), found = [];
  for (const name of ["message", "done", "error", "stopped"])
    source.addEventListener(name, event => found.push([event.type, JSON.parse(event.data), event.lastEventId]));
  let cut = false;
  try { await source.run(); } catch (error) { cut = true; }
  return {type: response.headers.get("content-type"), found, cut, comments: source.comments || 0};
}

async function leave() {
  const gone = new AbortController();
  const response = await ask("forever", "text/event-stream", gone.signal);
  await response.body.getReader().read();
  gone.abort();
}

(async () => {
  const found = {};
  try {
    found.lines = await lines("whole");
    found.events = await events("whole");
    found.failed = await events("failed");
    found.cutLines = await lines("cut");
    found.cutEvents = await events("cut");
    await leave();
  } catch (error) { found.error = String(error); }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


@pytest.fixture(scope="module", autouse=True)
def _chromium() -> None:
    require_chromium()


async def test_a_browser_reads_both_forms_and_every_end(tmp_path: Path) -> None:
    """Each line arrives as it was in either form, ends are what they are, and leaving the page's stream stops it."""
    gone = asyncio.Event()

    async def talk(line: Line) -> None:
        request = await line.request()
        await line.write(CHUNKED_HEAD)
        if b"forever" in request:
            await line.gone()
            gone.set()
            return
        for at in range(0, len(BODY), 40_001):  # in the middle of characters, too
            await line.write(chunk(BODY[at : at + 40_001]))
            await asyncio.sleep(0.1)
        if b"cut" in request:
            return
        await line.write((chunk(FAILED) if b"failed" in request else b"") + LAST_CHUNK)

    principals = Principals()
    settings = {"PROXY_HEARTBEAT_SECONDS": "0.05", "PROXY_POOL_IDLE_CONNECTIONS": "0"}
    async with (
        proxy_before(talk, tmp_path, principals, **settings) as (proxy, _),
        origin_of(PAGE.replace("TOKEN", principals.token("alice")), proxy.url) as origin,
    ):
        found = await browse(origin, tmp_path / "profile")
        async with asyncio.timeout(10):
            await gone.wait()

    expected = [json.loads(line) for line in LINES]
    assert "error" not in found
    assert (found["lines"]["found"], found["lines"]["cut"]) == (expected, False)
    assert found["lines"]["type"] == "application/x-ndjson"
    assert found["events"]["type"] == "text/event-stream; charset=utf-8"
    assert [event[1] for event in found["events"]["found"]] == [*expected, {"end": "done"}]
    assert [event[2].rpartition("-")[2] for event in found["events"]["found"]] == [str(n + 1) for n in range(9)]
    assert found["events"]["comments"] > 0
    assert [event[0] for event in found["failed"]["found"]] == ["message"] * 8 + ["error"]
    assert found["failed"]["found"][-1][1]["data"]["code"] == "upstream_error"
    assert (found["cutLines"]["found"], found["cutLines"]["cut"]) == (expected, True)
    assert [found["cutEvents"]["cut"], found["cutEvents"]["found"][-1][1]["data"]["code"]] == [False, "upstream_cut"]
