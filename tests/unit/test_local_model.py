"""What the local model makes of a prompt: the script it reads, and the deltas and usage it answers with."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from agentflow.core.state import AgentState, Message, ToolResultBlock
from agentflow.runtime.adapters.llm.model_response_converter import ModelResponseConverter
from hypothesis import given
from hypothesis import strategies as st

from agent_service.models import LocalModel, ScriptedError
from agent_service.script import (
    MOST_BYTES,
    MOST_SECONDS,
    MOST_WORDS,
    Bytes,
    Echo,
    Failure,
    Recall,
    Script,
    ToolCall,
    Words,
    deltas,
    parse_script,
)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("hello there", Script(Echo("hello there"))),
        ("[pace 20ms] hello", Script(Echo("hello"), pace=0.02)),
        ("[wait 2s][words 3]", Script(Words(3), wait=2.0)),
        ("[bytes 65536]", Script(Bytes(65536))),
        ("[recall] please", Script(Recall())),
        ("[fail 5]", Script(Words(5), failure=Failure(5))),
        ("[fail 0 out of  order]", Script(Words(0), failure=Failure(0, "out of  order"))),
        ("[words 9] [fail 2]", Script(Words(9), failure=Failure(2))),
        ("[tool add 2 -3]", Script(ToolCall("add", {"a": 2, "b": -3}))),
        ("[tool word_count one two]", Script(ToolCall("word_count", {"text": "one two"}))),
        ("[words 1] [words 2] [pace 1s] [pace 2s]", Script(Words(1), pace=1.0)),
    ],
)
def test_directives_become_a_script(text: str, script: Script) -> None:
    """Each directive means one thing, and the first of a kind wins."""
    parsed = parse_script(text)

    assert parsed == script


@pytest.mark.parametrize(
    "text",
    [
        "[pace]",
        "[pace 20]",
        "[pace -1ms]",
        f"[wait {MOST_SECONDS + 1:.0f}s]",
        f"[words {MOST_WORDS + 1}]",
        "[words ٣]",
        "[words two]",
        f"[bytes {MOST_BYTES + 1}]",
        "[fail soon]",
        "[recall everything]",
        "[tool]",
        "[tool add 2]",
        "[tool add 2 3 4]",
        "[tool word_count]",
        "[tool remove everything]",
        "[Words 3]",
        "[words 3",
    ],
)
def test_malformed_directives_are_plain_text(text: str) -> None:
    """What is not exactly a directive, or asks for more than the bounds, is echoed like any text."""
    parsed = parse_script(text)

    assert parsed == Script(Echo(text))


@given(st.text(alphabet=st.sampled_from("[] 019msabcdefilnoprtw_\n-"), max_size=80) | st.text())
def test_any_text_is_a_bounded_script(text: str) -> None:
    """No text makes the parser fail or the model work without end."""
    script = parse_script(text)

    assert 0 <= script.wait <= MOST_SECONDS
    assert 0 <= script.pace <= MOST_SECONDS
    assert script.failure is None or script.failure.after <= MOST_WORDS
    match script.answer:
        case Echo(echoed):
            assert len(echoed) <= len(text)
        case Words(count):
            assert count <= MOST_WORDS
        case Bytes(count):
            assert count <= MOST_BYTES


@given(st.text())
def test_an_echo_loses_nothing(text: str) -> None:
    """The deltas of an echo, put together, are the echo."""
    pieces = list(deltas(Echo(text), said=[], result=""))

    assert "".join(pieces) == f"You said: {text}"


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 65536])
def test_an_answer_has_the_size_asked_for(count: int) -> None:
    """`[bytes N]` is N bytes, and no delta is empty."""
    pieces = list(deltas(Bytes(count), said=[], result=""))

    assert sum(map(len, pieces)) == count
    assert all(pieces)


async def test_deltas_come_first_and_the_whole_last() -> None:
    """A stream is its deltas and then one whole message under the same id, with the usage."""
    messages = [message async for message in _stream("[words 3]")]

    *parts, whole = messages
    assert [(part.text(), part.delta) for part in parts] == [("w1 ", True), ("w2 ", True), ("w3 ", True)]
    assert (whole.text(), whole.delta) == ("w1 w2 w3 ", False)
    assert {message.message_id for message in parts} == {whole.message_id}


async def test_usage_counts_the_words_of_the_thread() -> None:
    """The prompt is everything in the thread, the completion is the answer, and the total is both."""
    earlier = [Message.text_message("one two"), Message.text_message("three", role="assistant")]

    answer = await (await _reply("four", *earlier)).invoke()

    assert answer.text() == "You said: four"
    assert answer.usages is not None
    assert answer.usages.prompt_tokens == 4
    assert answer.usages.completion_tokens == 3
    assert answer.usages.total_tokens == 7


async def test_recall_tells_what_the_user_said_before() -> None:
    """`[recall]` names the user's earlier messages alone, without the assistant's."""
    earlier = [Message.text_message("one"), Message.text_message("two", role="assistant")]

    answer = await (await _reply("[recall]", *earlier, Message.text_message("three"))).invoke()

    assert answer.text() == "one\nthree"


async def test_recall_of_a_new_thread_says_so() -> None:
    """There is an answer even when there is nothing to recall."""
    answer = await (await _reply("[recall]")).invoke()

    assert answer.text() == "Nothing was said before."


async def test_a_tool_is_called_before_its_result_is_told() -> None:
    """The first reply asks for the tool; once the result is in the thread, the next one tells it."""
    asked = await (await _reply("[tool add 2 3]")).invoke()

    assert asked.tools_calls is not None
    assert asked.tools_calls[0]["function"] == {"name": "add", "arguments": '{"a": 2, "b": 3}'}
    result = Message.tool_message([ToolResultBlock(call_id=asked.tools_calls[0]["id"], output="5")])
    told = await (await _answer_to([Message.text_message("[tool add 2 3]"), asked, result])).invoke()
    assert told.text() == "The tool add answered: 5"


@pytest.mark.parametrize(("text", "spoken"), [("[fail 2 no more]", 2), ("[words 9] [fail 0 no more]", 0)])
async def test_a_failure_comes_after_its_deltas(text: str, spoken: int) -> None:
    """`[fail N]` lets N deltas out, then raises its own message."""
    heard: list[str] = []

    with pytest.raises(ScriptedError, match="no more"):
        await _hear(text, heard)

    assert len(heard) == spoken


async def test_a_failure_beyond_the_answer_still_comes() -> None:
    """An answer that is shorter than its failure point fails at its end."""
    with pytest.raises(ScriptedError):
        await (await _reply("[words 1] [fail 5]")).invoke()


@pytest.mark.parametrize(("text", "spoken"), [("[wait 600s]", 0), ("[words 2] [pace 600s]", 1), ("[words 100000]", 1)])
async def test_a_cancelled_reply_stops(text: str, spoken: int) -> None:
    """Cancelling reaches the model before the first delta, between two, and without any pauses."""
    heard: list[str] = []
    task = asyncio.create_task(_hear(text, heard))
    await asyncio.sleep(0)
    while len(heard) < spoken:  # one turn of the loop is one step of the reply
        await asyncio.sleep(0)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(heard) == spoken


async def _answer_to(context: list[Message]) -> ModelResponseConverter:
    return await LocalModel().execute(AgentState(context=context), {})


async def _reply(text: str, *earlier: Message) -> ModelResponseConverter:
    return await _answer_to([*earlier, Message.text_message(text)])


async def _stream(text: str) -> AsyncIterator[Message]:
    async for message in (await _reply(text)).stream({"thread_id": "t"}, node_name="MAIN"):
        yield message


async def _hear(text: str, heard: list[str]) -> None:
    async for message in _stream(text):
        heard.append(message.text())  # noqa: PERF401  # what comes before a failure counts
