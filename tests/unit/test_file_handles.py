"""Handles of files: made for one caller and one file, and nobody's guess."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BodyInvalid, NotFound, Problem
from proxy.handles import Handles, open_handles, sealed_answer
from proxy.outages import UpstreamMalformed
from proxy.tenancy import RunRules, bind_run

TAG = "aaaabbbbccccdddd"
SECRET = b"the secret of the files' handles"
FILE = "0123456789abcdef0123456789abcdef"
MINE = Handles(TAG, SECRET)
THEIRS = Handles("eeeeffffgggghhhh", SECRET)
FILE_IDS = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=40).filter(
    lambda text: text[0] != "."
)


@given(FILE_IDS)
def test_a_handle_opens_for_its_caller_alone(file_id: str) -> None:
    """For nobody else, under no other secret, for no other file, and not without its seal."""
    handle = MINE.seal(file_id)

    assert MINE.open(handle) == file_id
    for other, named in (
        (THEIRS, handle),
        (Handles(TAG, b"another"), handle),
        (Handles(TAG, None), handle),
        (MINE, f"{handle}0"),
        (MINE, file_id),
        (MINE, f"{TAG}~{file_id}"),
        (MINE, THEIRS.seal(file_id)),
        (MINE, handle.upper() if handle.upper() != handle else ""),
    ):
        with pytest.raises(NotFound):
            other.open(named)


@given(st.text() | st.none() | st.integers() | st.lists(st.text()))
def test_whatever_is_no_handle_opens_nothing(value: object) -> None:
    """Any text and any other value is a file that is not there."""
    with pytest.raises(NotFound):
        MINE.open(value)


@pytest.mark.parametrize("file_id", ["", "a/b", "../x", ".", "a b", "ä", "a" * 129, "a\n", "a~b", "a%2Fb"])
def test_what_could_not_be_a_path_segment_gets_no_handle(file_id: str) -> None:
    """A sidecar that gives such an id is not understood, rather than believed."""
    with pytest.raises(UpstreamMalformed):
        MINE.seal(file_id)


def run_with(block: str) -> dict[str, Any]:
    """Bind a run in AgentFlow's form whose message has this block."""
    raw = f'{{"messages":[{{"role":"user","content":[{block}]}}]}}'.encode()
    rules = RunRules(allow_system=False, max_recursion=50, standing_thread=False, file_secret=SECRET)
    body = json.loads(bind_run(raw, tag=TAG, rules=rules, new_name=lambda: "new")[0])
    found: dict[str, Any] = body["messages"][0]["content"][0]
    return found


NAMING = [
    '{{"type":"image","media":{{"kind":"file_id","file_id":"{id}"}}}}',
    '{{"type":"image","media":{{"kind":"file_id","f\\u0069le_id":"{id}"}}}}',
    '{{"type":"document","media":{{"kind":"url","url":"agentflow://media/{id}"}}}}',
    '{{"type":"document","media":{{"kind":"url","url":"\\u0061gentflow:\\/\\/media\\/{id}"}}}}',
    '{{"type":"tool_result","output":[{{"type":"image","media":{{"url":"agentflow://media/{id}"}}}}]}}',
    '{{"type":"image","media":{{"file_id":"x","file_id":"{id}"}}}}',
    '{{"type":"image","media":{{"parts":["agentflow://media/{id}"]}}}}',
]


@pytest.mark.parametrize("block", NAMING)
def test_a_run_names_ones_own_file_by_its_handle(block: str) -> None:
    """Escaped, nested or twice: where the handle stood the sidecar's id goes on."""
    written = block.replace('"x"', f'"{MINE.seal(FILE)}"')

    bound = json.dumps(run_with(written.format(id=MINE.seal(FILE))))

    assert FILE in bound
    assert "~" not in bound


@pytest.mark.parametrize("named", [FILE, THEIRS.seal(FILE), f"{TAG}~{FILE}", f"./{FILE}", f"{FILE}~", "~"])
@pytest.mark.parametrize("block", NAMING)
def test_a_run_names_no_other_file(block: str, named: str) -> None:
    """The sidecar's own id is refused too: whose it is cannot be told from it."""
    with pytest.raises(NotFound):
        run_with(block.format(id=named))


def test_a_file_id_is_text() -> None:
    """Anything else the sidecar might make some text of; none at all is none."""
    for value in ("7", "true", "[]", '{"x":1}'):
        with pytest.raises(BodyInvalid):
            run_with(f'{{"media":{{"file_id":{value}}}}}')

    assert run_with('{"media":{"file_id":null,"url":"https://a.test/b"}}')["media"]["file_id"] is None


def test_what_somebody_says_names_nothing() -> None:
    """A text may speak of a file's address."""
    assert run_with('{"type":"text","text":"agentflow://media/x"}')["text"] == "agentflow://media/x"


VALUES = st.recursive(
    st.none()
    | st.integers()
    | st.sampled_from([FILE, MINE.seal(FILE), THEIRS.seal(FILE), f"agentflow://media/{FILE}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["file_id", "url", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(VALUES)
def test_any_value_is_opened_or_refused(value: Any) -> None:
    """What is opened holds no internal address that was not sealed, however deep."""
    before = json.dumps(value)
    try:
        open_handles(value, MINE)
    except Problem:
        return

    opened = json.dumps(value)
    raw_before = before.replace(f'"text": "agentflow://media/{FILE}"', "")
    assert f"agentflow://media/{FILE}" not in raw_before or isinstance(value, str)
    assert f'"file_id": "{THEIRS.seal(FILE)}"' not in opened


def test_an_answer_about_a_file_tells_its_handle() -> None:
    """Id and relative URL change; a signed URL of a store, and everything else, stay."""
    data = {"file_id": FILE, "url": f"/v1/files/{FILE}", "direct_url": "https://s.test/x", "size_bytes": 3}
    answer = {"data": data, "metadata": {"request_id": "r"}}

    sealed = json.loads(sealed_answer(json.dumps(answer).encode(), MINE))

    handle = MINE.seal(FILE)
    assert sealed == answer | {"data": data | {"file_id": handle, "url": f"/v1/files/{handle}"}}


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b"{}", b'{"data":null}', b'{"data":{}}', b'{"data":{"file_id":7}}', b'{"data":{"file_id":"a/b"}}'],
)
def test_an_answer_that_is_not_about_a_file_is_not_passed_on(answer: bytes) -> None:
    """It is the sidecar's fault, and no raw id slips through."""
    with pytest.raises(UpstreamMalformed):
        sealed_answer(answer, MINE)
