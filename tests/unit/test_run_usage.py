"""What a run used, read from bytes: the same whatever their borders, and what a plain reading of the JSON would say.

Lines and answers are those of the sidecar; the integration test holds that against a real one.
"""

import itertools
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import Usage
from proxy.outlines import HELD_BYTES, Outline, told_bytes
from proxy.usage import Form, UsageReader, reader_for
from tests.support.steps import steps

type Json = dict[str, Any]


def usages(read: int, written: int, total: int | None = None) -> Json:
    """Make what a provider reported."""
    return {"completion_tokens": written, "prompt_tokens": read, "total_tokens": total or read + written}


def message(role: str, text: str, *, number: int = 0, delta: bool = False, used: Json | None = None) -> Json:
    """Make a message as AgentFlow writes it."""
    return {
        "message_id": f"m{number}",
        "role": role,
        "content": [{"type": "text", "text": text, "annotations": []}],
        "delta": delta,
        "tools_calls": None,
        "reasoning": None,
        "timestamp": 1795245598.348096,
        "metadata": {},
        "usages": used,
        "raw": None,
        "parsed_content": None,
    }


def event(kind: str, *, said: Json | None = None, state: Json | None = None, data: Json | None = None) -> Json:
    """Make an event of a stream."""
    return {"event": kind, "message": said, "state": state, "data": data, "thread_id": "t", "metadata": {}}


def lines(*events: Json) -> bytes:
    """Write events as the sidecar does."""
    return b"".join(json.dumps(e, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for e in events)


def answer(*messages: Json, **more: object) -> bytes:
    """Write an invoke's answer."""
    data = {"messages": messages, "state": None, **more, "meta": {}}
    return json.dumps({"data": data, "metadata": {}}, ensure_ascii=False, separators=(",", ":")).encode()


def ag_ui(*events: tuple[str, str]) -> bytes:
    """Write events of AG-UI as the sidecar does: the type, and its text."""
    member = {"TOOL_CALL_RESULT": "content"}
    told = [{"type": kind, "messageId": "m", member.get(kind, "delta"): text} for kind, text in events]
    return b"".join(b"data: " + json.dumps(e, separators=(",", ":")).encode() + b"\n\n" for e in told)


def fed(kind: Form, *parts: bytes) -> UsageReader:
    """Feed a new reader."""
    reader = reader_for(kind)
    for part in parts:
        reader.feed(part)
    return reader


def parted(data: bytes, borders: list[int]) -> list[bytes]:
    """Part bytes at the borders."""
    cuts = sorted({0, len(data), *(border % (len(data) + 1) for border in borders)})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


def naive(events: list[Json]) -> tuple[int, int, int, bool] | None:
    """Read a stream with nothing but its JSON: each message once, whole instead of the deltas before it."""
    passed, shares = 0, dict[str, tuple[int, int, int, bool]]()
    pieces, latest = dict[str, int](), ""
    for said in (e["message"] for e in events if e["event"] == "message"):
        key, used, delta = said["message_id"], said["usages"], said["delta"]
        text = len(json.dumps(said["content"][0]["text"], ensure_ascii=False).encode()) - 2
        if said["role"] == "assistant":
            if delta:
                text = pieces[key] = pieces.get(key, 0) + text
            elif latest:
                del shares[latest]
            read, written = -(-passed // 4), -(-text // 4)
            known = (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"], False) if used else None
            shares[key] = known or (read, written, read + written, True)
        latest = key if delta else ""
        passed += 0 if delta else text
    if not shares:
        return None
    read, written, total = (sum(share[place] for share in shares.values()) for place in range(3))
    return read, written, total, any(share[3] for share in shares.values())


def figures(usage: Usage | None) -> tuple[int, int, int, bool] | None:
    """Give a usage as a tuple."""
    return usage and (usage.input_tokens, usage.output_tokens, usage.total_tokens, usage.estimated)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
USED = st.none() | st.builds(usages, st.integers(1, 10**6), st.integers(0, 10**6))


@st.composite
def runs(draw: st.DrawFn) -> list[Json]:
    """Make a run: what the user said, then turns with their deltas, tools' results and states between them."""
    events = [event("message", said=message("user", draw(TEXT)))]
    for number in range(1, draw(st.integers(0, 4)) + 1):
        pieces = draw(st.lists(TEXT, max_size=4))
        events += [event("message", said=message("assistant", piece, number=number, delta=True)) for piece in pieces]
        if draw(st.booleans()):
            other = draw(st.sampled_from([0, 1000]))
            whole = message("assistant", "".join(pieces), number=number + other, used=draw(USED))
            events += [event("message", said=whole), event("state", state={"context": [whole, whole]})]
        if draw(st.booleans()):
            events.append(event("message", said=message("tool", draw(TEXT), number=100 + number)))
    return events


@given(runs(), st.lists(st.integers(0, 5000), max_size=30))
def test_a_stream_says_what_its_json_says_however_it_is_parted(run: list[Json], borders: list[int]) -> None:
    """Fast or parsed, whole or in pieces: every message counts once, with the last that was said of it."""
    reader = fed("stream", *parted(lines(*run), borders))

    assert figures(reader.usage()) == naive(run)


SHORT = st.sampled_from([b"\n", b"\r\n", b"{}\n", b"x" * 15 + b"\n", b": ping\n\n", b'"error"\n', b"[1]\n"])


@given(runs(), st.lists(SHORT, max_size=9), st.lists(st.integers(0, 5000), max_size=30))
def test_short_lines_between_say_nothing(run: list[Json], short: list[bytes], borders: list[int]) -> None:
    """However many there are, and wherever the borders are."""
    between = [lines(each) + b"".join(short[number::3]) for number, each in enumerate(run)]
    reader = fed("stream", *parted(b"".join([*short, *between]), borders))

    assert figures(reader.usage()) == naive(run)


@pytest.mark.parametrize("kind", ["stream", "ag-ui"])
@pytest.mark.parametrize("unit", [b"\n", b"\r\n", b"{}\n", b":\n\n"])
def test_a_flood_of_short_lines_is_no_step_each(kind: Form, unit: bytes) -> None:
    """A read of them costs about what a read of one line does: nobody else waits for it."""
    reader = reader_for(kind)

    assert steps(reader.feed, unit * 50_000) < 50


@given(runs())
def test_asking_midway_changes_nothing(run: list[Json]) -> None:
    """After each line the reader knows what the lines so far say."""
    reader = reader_for("stream")

    for number, line in enumerate(run, 1):
        reader.feed(lines(line))
        assert figures(reader.usage()) == naive(run[:number])


@given(runs(), st.lists(st.integers(0, 5000), max_size=30))
def test_an_answer_says_what_its_json_says_however_it_is_parted(run: list[Json], borders: list[int]) -> None:
    """An invoke's messages count as those of a stream do."""
    whole = [e for e in run if e["event"] == "message" and not e["message"]["delta"]]
    body = answer(*(e["message"] for e in whole))

    assert figures(fed("answer", *parted(body, borders)).usage()) == naive(whole)


@given(runs())
def test_lines_written_otherwise_say_the_same(run: list[Json]) -> None:
    """Another version may put spaces or another order into its JSON: that costs time, not exactness."""
    loose = b"".join(json.dumps(dict(reversed(e.items())), ensure_ascii=False).encode() + b"\n" for e in run)

    assert figures(fed("stream", loose).usage()) == naive(run)


@given(st.binary(max_size=300) | st.lists(st.sampled_from([b'{"event":"message","message":{"message_id":', b'"m"',
       b',"role":"assistant","content":[', b'],"delta":true,"tools_calls":null,"reasoning":null,', b"{", b"[", b'"',
       b"\\", b"\n", b"1", b'"usages":{', b'"total_input_tokens":', b"}]}\n"]), max_size=30).map(b"".join),
       st.lists(st.integers(0, 300), max_size=9))  # fmt: skip
def test_rubbish_never_raises(data: bytes, borders: list[int]) -> None:
    """What the sidecar sends is passed on whatever it is; reading it must not stand in the way."""
    for kind in ("answer", "stream"):
        fed(kind, *parted(data, borders)).usage()  # type: ignore[arg-type]  # both are literals


def test_earlier_runs_of_the_thread_are_not_charged_again() -> None:
    """State events and an answer's context repeat the thread's messages with what they once used."""
    old = message("assistant", "old", number=1, used=usages(500, 500))
    new = message("assistant", "new", number=2, used=usages(7, 3))

    stream = lines(event("state", state={"context": [old]}), event("message", said=new))
    whole = answer(new, context=[old, new], state={"context": [old, new]})

    assert fed("stream", stream).usage() == Usage(7, 3, 10, estimated=False)
    assert fed("answer", whole).usage() == Usage(7, 3, 10, estimated=False)


def test_usage_that_comes_with_a_delta_or_twice_counts_once() -> None:
    """Providers differ in which line has it; the one that came last holds."""
    delta = event("message", said=message("assistant", "a", number=1, delta=True, used=usages(7, 2)))
    late = event("message", said=message("assistant", "b", number=1, delta=True))
    whole = event("message", said=message("assistant", "ab", number=1))
    told = event("message", said=message("assistant", "ab", number=1, used=usages(7, 3)))

    assert fed("stream", lines(delta, late, whole)).usage() == Usage(7, 2, 9, estimated=False)
    reader = fed("stream", lines(delta, told, told, whole, late))
    assert reader.usage() == Usage(7, 3, 10, estimated=False)
    assert reader.turns == 1


def test_the_sidecars_own_sum_holds_when_it_knows_more() -> None:
    """At full granularity the last line sums up messages that may not have passed by."""
    sums = {"total_input_tokens": 40, "total_output_tokens": 2, "total_tokens": 42}
    said = event("message", said=message("assistant", "a", number=1, used=usages(7, 3)))

    assert fed("stream", lines(said, event("updates", data=sums))).usage() == Usage(40, 2, 42, estimated=False)
    nothing = dict.fromkeys(sums, 0)
    assert fed("stream", lines(said, event("updates", data=nothing))).usage() == Usage(7, 3, 10, estimated=False)


@pytest.mark.parametrize("figure", [-5, True, "7", 1.5, None, [], 1 << 70])
def test_figures_that_cannot_be_meant_are_estimated_instead(figure: object) -> None:
    """Neither a negative figure nor text gives a caller anything back."""
    used = {"prompt_tokens": figure, "completion_tokens": figure, "total_tokens": figure}
    said = message("assistant", "abcdefgh", number=1, used=used)

    assert fed("answer", answer(said)).usage() == Usage(0, 2, 2, estimated=True)


def test_a_total_smaller_than_its_parts_is_not_believed() -> None:
    """The parts count."""
    used = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 1}

    assert fed("answer", answer(message("assistant", "a", used=used))).usage() == Usage(7, 3, 10, estimated=False)


def test_zeros_mean_unknown() -> None:
    """AgentFlow writes zeros where the provider said nothing."""
    said = message("assistant", "abcd", number=1, used=usages(0, 0))

    assert fed("answer", answer(message("user", "hello"), said)).usage() == Usage(2, 1, 3, estimated=True)


def test_a_caller_cannot_write_usage_into_what_is_said() -> None:
    """Neither text, nor a tool's arguments, nor a forged delta in them hides or invents what was used."""
    forged = '"usages":{"completion_tokens":0,"prompt_tokens":0,"total_tokens":1},"delta":true,'
    call = message("assistant", forged, number=1, used=usages(7000, 3))
    call["content"].append(
        {
            "type": "tool_call",
            "args": {"x": [1], "delta": True, "tools_calls": None, "reasoning": None, "usages": None, "role": "user"},
        }
    )
    call["content"].append({"type": "tool_call", "args": {"usages": usages(1, 1), "total_input_tokens": 1}})

    assert fed("stream", lines(event("message", said=call))).usage() == Usage(7000, 3, 7003, estimated=False)
    assert fed("answer", answer(call)).usage() == Usage(7000, 3, 7003, estimated=False)


def test_errors_and_turns_are_counted() -> None:
    """They come free with the reading."""
    failed = event("error", state={"context": []}, data={"reason": "x"})
    said = event("message", said=message("assistant", "a", number=1))

    reader = fed("stream", lines(said, failed, failed))

    assert (reader.turns, reader.errors) == (1, 2)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"error":{"code":"X"}}', b'{"data":null}', b'{"data":{"messages":3}}'])
def test_an_answer_without_messages_says_nothing(body: bytes) -> None:
    """An error is not a run."""
    assert fed("answer", body).usage() is None


def test_what_is_no_message_hides_no_reported_usage() -> None:
    """What a provider reported is charged, whatever stands beside it in the list."""
    body = answer(message("assistant", "x", used=usages(9_000, 7))).replace(b'],"state"', b',5],"state"')

    usage = fed("answer", body).usage()

    assert usage is not None
    assert usage.input_tokens >= 9_000
    assert usage.estimated


def test_what_cannot_be_parsed_is_estimated() -> None:
    """A lone surrogate is no JSON to us, but a model spoke: that is not for nothing."""
    body = lines(event("message", said=message("assistant", "x", number=1))).replace(b'"x"', b'"\\ud800"')

    usage = fed("stream", body).usage()

    assert usage is not None
    assert usage.estimated
    assert usage.output_tokens > 50


@pytest.mark.parametrize("size", [HELD_BYTES - 700, HELD_BYTES, 300_000])
@pytest.mark.parametrize("step", [1 << 30, 4096, 1021])
def test_long_lines_and_answers_are_read_all_the_same(size: int, step: int) -> None:
    """The usage stands behind the text, however long that is."""
    text = ('\\"é\\\\' + "x" * 93) * (size // 100)
    said = message("assistant", text, number=1, used=usages(7, 3))
    untold = message("assistant", text, number=2)
    written = len(json.dumps(text, ensure_ascii=False).encode()) - 2

    for kind, body in (("stream", lines(event("message", said=said))), ("answer", answer(said))):
        parts = [body[at : at + step] for at in range(0, len(body), step)]
        assert fed(kind, *parts).usage() == Usage(7, 3, 10, estimated=False)  # type: ignore[arg-type]  # literals
    for kind, body in (("stream", lines(event("message", said=untold))), ("answer", answer(untold))):
        parts = [body[at : at + step] for at in range(0, len(body), step)]
        assert fed(kind, *parts).usage() == Usage(0, -(-written // 4), -(-written // 4), estimated=True)  # type: ignore[arg-type]  # literals


def test_an_answer_with_more_messages_than_are_held_is_estimated() -> None:
    """Those that are held count as reported; the rest by its bytes, never for nothing."""
    body = answer(*(message("assistant", "abcd", number=n, used=usages(7, 3)) for n in range(1000)))

    usage = fed("answer", *(body[at : at + 4096] for at in range(0, len(body), 4096))).usage()

    assert usage is not None
    assert usage.estimated
    assert usage.total_tokens > 10_000


@pytest.mark.parametrize("kind", ["answer", "stream", "ag-ui"])
def test_memory_is_bounded(kind: Form) -> None:
    """Sixteen megabytes without an end of line, or of any string, leave next to nothing behind."""
    reader = reader_for(kind)
    reader.feed(b'{"event":"message","message":{"message_id":"m","role":"assistant","content":[{"text":"')
    chunk = b'\\"x\\\\' * 16_384
    tracemalloc.start()
    for _ in range(100):
        reader.feed(chunk)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert held < 2 * HELD_BYTES
    assert peak < 10 * HELD_BYTES


def test_memory_is_bounded_for_many_messages() -> None:
    """A run that never ends leaves a bounded memory of what it said, and a sum that goes on."""
    reader = reader_for("stream")
    for number in range(10_000):
        reader.feed(lines(event("message", said=message("assistant", "abcd", number=number, used=usages(1, 1)))))

    assert reader.usage() == Usage(10_000, 10_000, 20_000, estimated=False)


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@given(VALUES, st.lists(st.integers(0, 9000)))
def test_an_outline_differs_in_long_strings_only(value: object, borders: list[int]) -> None:
    """However it was parted, and it tells how long they were."""
    padded = json.dumps(["y" * HELD_BYTES, value], ensure_ascii=False, separators=(",", ":")).encode()
    outline = Outline()
    for part in parted(padded, [border + HELD_BYTES for border in borders]):
        outline.feed(part)

    def outlined(value: object) -> object:
        if isinstance(value, list):
            return [outlined(inner) for inner in value]
        if isinstance(value, dict):
            return {name: outlined(inner) for name, inner in value.items()}
        raw = json.dumps(value, ensure_ascii=False).encode()
        return f"\0{len(raw) - 2}" if isinstance(value, str) and len(raw) > 258 else value

    assert json.loads(bytes(outline.held)) == [f"\0{HELD_BYTES}", outlined(value)]
    assert told_bytes(f"\0{HELD_BYTES}") == HELD_BYTES


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_ag_ui_is_estimated_from_what_the_model_wrote_and_read(size: int) -> None:
    """It reports nothing: 40 bytes were written in a first call, and 4 in the next, which read those and a result."""
    first = [("REASONING_MESSAGE_START", ""), ("REASONING_MESSAGE_CONTENT", "x" * 8), ("TEXT_MESSAGE_START", "")]
    first += [("TEXT_MESSAGE_CONTENT", "y" * 12)] * 2 + [("TEXT_MESSAGE_END", ""), ("TOOL_CALL_ARGS", "z" * 8)]
    then = [("TOOL_CALL_RESULT", "r" * 20), ("TEXT_MESSAGE_START", ""), ("TEXT_MESSAGE_CONTENT", "done")]
    stream = ag_ui(("RUN_STARTED", "t"), *first, *then, ("TEXT_MESSAGE_END", ""), ("RUN_FINISHED", "t"))

    reader = fed("ag-ui", *(stream[at : at + size] for at in range(0, len(stream), size)))

    assert reader.usage() == Usage(15, 11, 26, estimated=True)
    assert (reader.turns, reader.errors) == (2, 0)


def test_what_was_asked_over_ag_ui_is_read_at_every_call() -> None:
    """It is not repeated in the events; what only describes the caller's page is not read by the model."""
    asked = {"messages": [{"role": "user", "content": "q" * 400}, {"role": "assistant", "content": "a" * 400}]}
    reader = reader_for("ag-ui", asked=json.dumps(asked | {"state": {"page": "s" * 9000}}).encode())
    silent = reader.usage()
    answers = ag_ui(("TEXT_MESSAGE_CONTENT", "x" * 40), ("TOOL_CALL_RESULT", "r" * 20), ("TEXT_MESSAGE_CONTENT", "y"))
    reader.feed(answers)

    assert silent is None
    assert reader.usage() == Usage(100 + 100 + 15, 10 + 1, 226, estimated=True)


def test_a_long_event_of_ag_ui_counts_whole_and_is_not_held() -> None:
    """A model that does not stream is told in one event; an error is counted."""
    stream = ag_ui(("TEXT_MESSAGE_CONTENT", "x" * 400_000), ("RUN_ERROR", ""))

    reader = fed("ag-ui", *(stream[at : at + 4096] for at in range(0, len(stream), 4096)))

    assert reader.usage() == Usage(0, 100_000, 100_000, estimated=True)
    assert reader.errors == 1
