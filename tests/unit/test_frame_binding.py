"""Binding what is said on a WebSocket: the rules of a run's body, and the two ways in which a run begins there."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BodyInvalid, ClientProblem, NotFound, Problem, RateExceeded
from proxy.frames import bind_frame, ends_a_run, error_frame
from proxy.handles import Handles
from proxy.tenancy import OVERWRITTEN_CONFIG, REFUSED_CONFIG, REFUSED_STATE, RunRules

TAG = "aaaabbbbccccdddd"
OTHER = "eeeeffffgggghhhh"
SECRET = b"the secret of the files' handles"
RULES = RunRules(allow_system=False, max_recursion=50, standing_thread=False, file_secret=SECRET)
USER = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
RESULT = {"role": "tool", "content": [{"type": "tool_result", "call_id": "c", "output": "5"}]}

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["user", "new", "x", f"{TAG}~a", f"{OTHER}~a", "fresh"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "x"]), inner, max_size=3),
    max_leaves=6,
)
CONFIG_NAMES = st.sampled_from([*REFUSED_CONFIG, *OVERWRITTEN_CONFIG, "thread_id", "run_id", "_x", "x"])
FRAMES = st.fixed_dictionaries(
    {},
    optional={
        "invoke_type": st.sampled_from(["fresh", "resume"]) | VALUES,
        "messages": VALUES,
        "tool_result": VALUES,
        "config": st.dictionaries(CONFIG_NAMES, VALUES, max_size=3) | VALUES,
        "initial_state": st.dictionaries(st.sampled_from([*REFUSED_STATE, "_x", "x"]), VALUES, max_size=2) | VALUES,
        "recursion_limit": st.integers(-1, 101) | VALUES,
        "resume": VALUES,
        "text": VALUES,
    },
)


def bind(value: object) -> dict[str, Any]:
    """Bind what a client would say; give what goes on."""
    body: dict[str, Any] = json.loads(
        bind_frame(json.dumps(value).encode(), tag=TAG, rules=RULES, new_name=lambda: "made")[0]
    )
    return body


def test_a_run_is_on_the_callers_thread() -> None:
    """Fresh or resumed, in AgentFlow's form or the short one; `new` is no name, here as in the sidecar."""
    fresh = {"invoke_type": "fresh", "messages": [USER]}
    resumed = {"invoke_type": "resume", "tool_result": [RESULT], "config": {"thread_id": "a"}}

    assert bind(fresh) == fresh | {"config": {"thread_id": f"{TAG}~made"}, "recursion_limit": 25}
    assert bind(resumed) == resumed | {"config": {"thread_id": f"{TAG}~a"}, "recursion_limit": 25}
    assert bind({"text": "hi", "thread_id": "a"})["config"] == {"thread_id": f"{TAG}~a"}
    for name in ("new", " new ", "", None):
        assert bind(fresh | {"config": {"thread_id": name}})["config"] == {"thread_id": f"{TAG}~made"}


@pytest.mark.parametrize("named", [f"{OTHER}~a", f" {OTHER}~a", f"{TAG}~{OTHER}~a"])
def test_anothers_thread_is_not_found(named: str) -> None:
    """Neither to run on nor to resume."""
    for said in ({"messages": [USER]}, {"invoke_type": "resume", "tool_result": [RESULT]}):
        with pytest.raises(NotFound):
            bind(said | {"config": {"thread_id": named}})


@pytest.mark.parametrize(
    "members",
    [
        {"invoke_type": "resume", "tool_result": [RESULT]},
        {"invoke_type": "resume", "tool_result": [RESULT], "config": {"thread_id": "new"}},
        {"invoke_type": "FRESH"},
        {"invoke_type": None},
        {"messages": [{"role": "system", "content": []}]},
        {"tool_result": [{"role": "system", "content": []}]},
        {"tool_result": {"role": "tool"}},
        {"initial_state": {"current_node": "TOOL"}},
        {"config": {"user_id": "alice"}},
        {"config": {"_x": 1}},
        {"recursion_limit": 51},
        {"resume": None},
        {"thread_id": f"{OTHER}~a"},
    ],
    ids=json.dumps,
)
def test_what_steers_is_refused(members: dict[str, object]) -> None:
    """A result of a tool is held to the rules of a message."""
    with pytest.raises(BodyInvalid):
        bind({"messages": [USER]} | members)


def test_a_tool_result_names_ones_own_file_only() -> None:
    """What comes back from a client's tool is a message too."""

    def with_file(name: str) -> dict[str, object]:
        block = {"type": "tool_result", "call_id": "c", "output": [{"media": {"url": f"agentflow://media/{name}"}}]}
        config = {"thread_id": "a"}
        return {"invoke_type": "resume", "tool_result": [{"role": "tool", "content": [block]}], "config": config}

    assert "agentflow://media/f1" in json.dumps(bind(with_file(Handles(TAG, SECRET).seal("f1"))))
    for name in ("f1", Handles(OTHER, SECRET).seal("f1")):
        with pytest.raises(NotFound):
            bind(with_file(name))


@given(FRAMES)
def test_any_message_is_bound_or_refused(value: dict[str, object]) -> None:
    """Whatever JSON comes, what goes on carries the tag, or a problem of the client's is told."""
    try:
        body = bind(value)
    except Problem as problem:
        assert isinstance(problem, ClientProblem)  # noqa: PT017  which problem it is, is the claim
        return

    assert body["config"]["thread_id"].startswith(f"{TAG}~")
    assert not {key for key in body["config"] if key in REFUSED_CONFIG | OVERWRITTEN_CONFIG or key.startswith("_")}
    assert 1 <= body["recursion_limit"] <= 50
    assert "resume" not in body


@given(st.binary(max_size=60))
def test_any_bytes_are_bound_or_refused(raw: bytes) -> None:
    """What is no JSON object is a problem, never a failure."""
    try:
        bind_frame(raw, tag=TAG, rules=RULES, new_name=lambda: "made")
    except Problem as problem:
        assert isinstance(problem, ClientProblem)  # noqa: PT017  as above


def test_a_refusal_has_the_form_of_the_sidecars_errors() -> None:
    """Event, reason, and when to come back; our code and id beside them."""
    refused = json.loads(error_frame(RateExceeded(policies=("requests",), retry_after=7, fields=[]), request_id="r"))
    invalid = json.loads(error_frame(BodyInvalid("no such thing"), request_id="r"))

    assert (refused["event"], refused["data"]["retry_after_seconds"]) == ("error", 7)
    assert invalid["data"] == {"reason": "no such thing", "code": "invalid_body", "status": 422, "request_id": "r"}


@pytest.mark.parametrize(
    ("frame", "last"),
    [
        ('{"event":"updates","data":{"status":"done"}}', True),
        ('{"event":"error","data":{"reason":"x"}}', True),
        ('{"event":"error","data":{"reason":"x"},"thread_id":"t~a","run_id":"r"}', False),
        ('{"event":"message","message":{"content":"{\\"status\\":\\"done\\"}"}}', False),
        ('{"event":"updates","data":{"status":"more"}}', False),
        ('{"event":"updates","data":null}', False),
        ("[]", False),
        ("", False),
        (None, False),
        (b"\xff", False),
    ],
)
def test_the_end_of_a_run_is_known(frame: str | bytes | None, last: bool) -> None:
    """So that a proxy which is to end lets a run finish, and waits for nothing else."""
    assert ends_a_run(frame) is last
