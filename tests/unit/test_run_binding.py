"""Binding the bodies that name a thread: AgentFlow's own, the short form, and the one that stops a run."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BodyInvalid, ClientProblem, NotFound, Problem
from proxy.tenancy import (
    OVERWRITTEN_CONFIG,
    REFUSED_CONFIG,
    REFUSED_STATE,
    RunRules,
    bind_control,
    bind_run,
    decode_object,
)

TAG = "aaaabbbbccccdddd"
OTHER = "eeeeffffgggghhhh"
RULES = RunRules(allow_system=False, max_recursion=50, standing_thread=False)
USER = {"role": "user", "content": [{"type": "text", "text": "hi"}]}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "system", "low", "Infinity", "support-42", f"{TAG}~a", f"{OTHER}~a"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
CONFIG_NAMES = st.sampled_from([*REFUSED_CONFIG, *OVERWRITTEN_CONFIG, "thread_id", "run_id", "_x", "", "model", "x"])
CONFIGS = st.dictionaries(CONFIG_NAMES, VALUES, max_size=3) | VALUES
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content"]), VALUES, max_size=2), max_size=2) | VALUES
STATES = st.dictionaries(st.sampled_from([*REFUSED_STATE, "_x", "x"]), VALUES, max_size=2) | VALUES
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES,
        "config": CONFIGS,
        "initial_state": STATES,
        "recursion_limit": st.integers(-1, 101) | VALUES,
        "response_granularity": VALUES,
        "resume": VALUES,
        "text": VALUES,
        "thread_id": VALUES,
        "more": VALUES,
    },
)


def encoded(value: object) -> bytes:
    """Write JSON as a client would."""
    return json.dumps(value).encode()


def bind(value: object, *, rules: RunRules = RULES) -> tuple[dict[str, Any], str]:
    """Bind a run's body, and read what the sidecar will."""
    body, thread_id = bind_run(
        value if isinstance(value, bytes) else encoded(value), tag=TAG, rules=rules, new_name=lambda: "new"
    )
    return json.loads(body), thread_id


def test_the_short_form_is_one_user_message() -> None:
    """`text` becomes AgentFlow's message, in the thread that is named."""
    body, thread_id = bind({"text": "hi", "thread_id": "support-42"})

    assert body == {"messages": [USER], "config": {"thread_id": f"{TAG}~support-42"}, "recursion_limit": 25}
    assert thread_id == f"{TAG}~support-42"


def test_the_full_form_passes_with_its_thread_bound() -> None:
    """Every member of AgentFlow's request arrives as it was sent, but for the thread's tag."""
    sent = {
        "messages": [USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": []}],
        "config": {"thread_id": 42, "run_id": "r:1", "model": {"name": "m"}},
        "initial_state": {"count": 1.5, "big": 2**70},
        "recursion_limit": 50,
        "response_granularity": "partial",
        "resume": ["é", None, True],
    }

    body, thread_id = bind(sent)

    assert body == sent | {"config": {"thread_id": f"{TAG}~42", "run_id": "r:1", "model": {"name": "m"}}}
    assert thread_id == f"{TAG}~42"


@pytest.mark.parametrize(
    "value",
    [
        {"text": "hi"},
        {"text": "hi", "thread_id": None},
        {"text": "hi", "thread_id": " "},
        {"messages": [USER]},
        {"messages": [USER], "config": None},
        {"messages": [USER], "config": {"thread_id": ""}},
        {},
    ],
)
@pytest.mark.parametrize(("standing", "name"), [(False, "new"), (True, "standing")])
def test_who_names_no_thread_gets_one_of_his_own(value: object, standing: bool, name: str) -> None:
    """It is a new one, or always the same, by the operator's choice."""
    rules = RunRules(allow_system=False, max_recursion=50, standing_thread=standing)

    body, thread_id = bind(value, rules=rules)

    assert thread_id == body["config"]["thread_id"] == f"{TAG}~{name}"


@pytest.mark.parametrize(("limit", "given_limit"), [(50, 25), (25, 25), (10, 10), (1, 1)])
@pytest.mark.parametrize("value", [{"text": "hi"}, {}, {"recursion_limit": None}])
def test_recursion_is_always_limited(value: object, limit: int, given_limit: int) -> None:
    """Who asks for no limit gets 25, or the most there is."""
    rules = RunRules(allow_system=False, max_recursion=limit, standing_thread=False)

    body, _ = bind(value, rules=rules)

    assert body["recursion_limit"] == given_limit


def test_recursion_up_to_the_most_is_granted() -> None:
    """The most is allowed; one more is refused and told."""
    body, _ = bind({"recursion_limit": 50})
    with pytest.raises(BodyInvalid) as refused:
        bind({"recursion_limit": 51})

    assert body["recursion_limit"] == 50
    assert refused.value.detail == "recursion_limit must be at most 50."


@pytest.mark.parametrize("name", [*sorted(REFUSED_CONFIG), "_", "__class__", "_thread_id"])
@pytest.mark.parametrize("value", [None, "x", {}])
def test_config_cannot_steer_identity(name: str, value: object) -> None:
    """Keys of `config` that say who one is, or reach into the graph, are refused by name, in runs and stops."""
    raw = encoded({"thread_id": "a", "config": {name: value}})

    with pytest.raises(BodyInvalid) as in_run:
        bind({"config": {name: value}})
    with pytest.raises(BodyInvalid) as in_stop:
        bind_control(raw, tag=TAG)

    assert in_run.value.detail == in_stop.value.detail == f"config may not set {name}."


def test_what_the_sidecar_sets_itself_is_dropped() -> None:
    """Keys of `config` that would be overwritten do not arrive, whatever they hold."""
    config: dict[str, object] = {name: {"any": [1]} for name in OVERWRITTEN_CONFIG}

    body, _ = bind({"config": config | {"x": 1}})

    assert body["config"] == {"x": 1, "thread_id": f"{TAG}~new"}


@pytest.mark.parametrize("name", [*sorted(REFUSED_STATE), "_x"])
def test_state_cannot_forge_history(name: str) -> None:
    """Keys of `initial_state` that hold history or a place in the graph are refused by name."""
    with pytest.raises(BodyInvalid) as refused:
        bind({"initial_state": {name: []}})

    assert refused.value.detail == f"initial_state may not set {name}."


def test_only_the_first_refused_keys_are_told() -> None:
    """An answer stays short however many keys a request has."""
    config = {f"_{number:0100}": 1 for number in range(100)}

    with pytest.raises(BodyInvalid) as refused:
        bind({"config": config})

    assert len(refused.value.detail) < 250


@pytest.mark.parametrize("run_id", ["r", "A-1.b:c_2", "a" * 128, None])
def test_a_plain_run_id_passes(run_id: str | None) -> None:
    """A run may be named, plainly, or not."""
    body, _ = bind({"config": {"run_id": run_id}})

    assert body["config"]["run_id"] == run_id


@pytest.mark.parametrize("run_id", ["", "a b", "a/b", "a~b", "a\n", "é", "a" * 129, 1, True, [], {}])
def test_another_run_id_is_refused(run_id: object) -> None:
    """What could not stand in a path or a log is no run's name."""
    with pytest.raises(BodyInvalid, match=r"config\.run_id"):
        bind({"config": {"run_id": run_id}})


@pytest.mark.parametrize("role", ["system", "User", "", "developer", None, 1, [], {}, ["user"]])
def test_another_role_is_refused(role: object) -> None:
    """A message speaks as user, assistant or tool, and says so; its place is told."""
    with pytest.raises(BodyInvalid) as refused:
        bind({"messages": [USER, {"role": role, "content": []}]})

    assert refused.value.detail == "messages[1].role must be one of assistant, tool, user."


def test_a_message_without_a_role_is_refused() -> None:
    """A role is never assumed."""
    with pytest.raises(BodyInvalid, match=r"messages\[0\]\.role"):
        bind({"messages": [{"content": []}]})


def test_system_messages_pass_where_the_operator_lets_them() -> None:
    """The role `system` is a setting's to allow."""
    rules = RunRules(allow_system=True, max_recursion=50, standing_thread=False)

    body, _ = bind({"messages": [{"role": "system", "content": "x"}]}, rules=rules)

    assert body["messages"] == [{"role": "system", "content": "x"}]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"messages": [], "more": 1}, "unknown members: more."),
        ({"messages": [], "Config": {}}, "unknown members: Config."),
        ({"messages": [], "thread_id": "a"}, "unknown members: thread_id."),
        ({"messages": "hi"}, "messages: "),
        ({"messages": ["hi"]}, "messages.0: "),
        ({"messages": None}, "messages: "),
        ({"config": []}, "config: "),
        ({"initial_state": "x"}, "initial_state: "),
        ({"recursion_limit": 0}, "recursion_limit: "),
        ({"recursion_limit": 101}, "recursion_limit: "),
        ({"recursion_limit": 25.0}, "recursion_limit: "),
        ({"recursion_limit": "25"}, "recursion_limit: "),
        ({"recursion_limit": True}, "recursion_limit: "),
        ({"response_granularity": "medium"}, "response_granularity: "),
        ({"text": ""}, "text: "),
        ({"text": 1}, "text: "),
        ({"text": None}, "text: "),
        ({"text": "hi", "messages": []}, "unknown members: messages."),
        ({"text": "hi", "config": {}}, "unknown members: config."),
        ({"text": "hi", "recursion_limit": 5}, "unknown members: recursion_limit."),
    ],
)
def test_what_is_no_run_is_refused_by_place(value: object, place: str) -> None:
    """A member that is unknown or of the wrong kind is refused, and named."""
    with pytest.raises(BodyInvalid) as refused:
        bind(value)

    assert place in refused.value.detail


def test_a_refusal_does_not_repeat_the_body() -> None:
    """What was sent stays out of the answer, save the beginnings of names; the answer stays short."""
    body = {f"{number}{'n' * 10_000}": "s3cret" for number in range(100)} | {"messages": [["s3cret"]]}

    with pytest.raises(BodyInvalid) as refused:
        bind(body)

    assert "s3cret" not in refused.value.detail
    assert len(refused.value.detail) < 1000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"{}x",
        b"\xef\xbb\xbf{}",
        b'{"text":"\xff"}',
        b'{"text":"\xed\xa0\x80"}',
        b'{"text":"\\ud800"}',
        b"{'text':'a'}",
        b'{"resume":NaN}',
        b'{"resume":Infinity}',
        b'{"resume":-Infinity}',
        b'{"resume":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"resume":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"resume":' + b"9" * 5000 + b"}",
        '{"text":"a"}'.encode("utf-16"),
        b"[]",
        b"null",
        b'"text"',
        b"1",
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    """A body is a JSON object of bounded depth, in UTF-8, with finite numbers."""
    with pytest.raises(ClientProblem) as refused:
        decode_object(raw)

    assert refused.value.status == 400


@pytest.mark.parametrize("number", ["1e999", "-1e999", "[1e999]", '{"a":[[1e400]]}', '["Infinity",1e999]'])
def test_a_number_beyond_a_double_is_refused(number: str) -> None:
    """What would be passed on as no JSON is not passed on."""
    with pytest.raises(BodyInvalid, match="too large"):
        bind(f'{{"resume":{number}}}'.encode())


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN", 'the "Infinity" stones'])
def test_a_word_is_no_number(text: str) -> None:
    """Text may say Infinity."""
    body, _ = bind({"text": text})

    assert body["messages"][0]["content"][0]["text"] == text


def test_the_last_of_two_members_is_the_only_one() -> None:
    """Of a name that comes twice one value is checked, and that one alone is sent."""
    raw = (
        b'{"config":{"user_id":"eve"},"config":{"thread_id":"a"},"messages":[]}',
        b'{"config":{"thread_id":"a"},"config":{"user_id":"eve"},"messages":[]}',
    )

    body, _ = bind(raw[0])
    with pytest.raises(BodyInvalid, match="user_id"):
        bind(raw[1])

    assert body["config"] == {"thread_id": f"{TAG}~a"}
    assert bind_run(raw[0], tag=TAG, rules=RULES, new_name=lambda: "new")[0].count(b'"config"') == 1


@pytest.mark.parametrize("thread_id", [f"{OTHER}~a", "~a", f"{TAG}~{OTHER}~a"])
@pytest.mark.parametrize("form", ["short", "full", "stop", "stop's config"])
def test_anothers_thread_is_not_found_in_any_form(thread_id: str, form: str) -> None:
    """No form of body reaches a thread under another tag."""
    raw = {
        "short": {"text": "hi", "thread_id": thread_id},
        "full": {"messages": [], "config": {"thread_id": thread_id}},
        "stop": {"thread_id": thread_id},
        "stop's config": {"thread_id": "a", "config": {"thread_id": thread_id}},
    }[form]

    with pytest.raises(NotFound):
        bind(raw) if form in ("short", "full") else bind_control(encoded(raw), tag=TAG)


@pytest.mark.parametrize(
    ("value", "config"),
    [
        ({"thread_id": "a"}, {}),
        ({"thread_id": " a ", "config": None}, {}),
        ({"thread_id": "a", "config": {"thread_id": f"{TAG}~a", "timestamp": 1, "x": 2}}, {"x": 2}),
        ({"thread_id": f"{TAG}~a", "config": {"thread_id": ""}}, {}),
    ],
)
def test_a_stop_names_one_thread(value: object, config: object) -> None:
    """What acts on a thread says so at its top, and nowhere else."""
    body, thread_id = bind_control(encoded(value), tag=TAG)

    assert json.loads(body) == {"thread_id": f"{TAG}~a", "config": config}
    assert thread_id == f"{TAG}~a"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"thread_id": None},
        {"thread_id": " "},
        {"thread_id": []},
        {"thread_id": "a", "config": {"thread_id": "b"}},
        {"thread_id": "a", "config": {"thread_id": 1}},
        {"thread_id": "a", "config": []},
        {"thread_id": "a", "more": 1},
        {"config": {"thread_id": "a"}},
    ],
)
def test_another_stop_is_refused(value: object) -> None:
    """No thread, two threads, or more than a thread is no stop."""
    with pytest.raises(BodyInvalid):
        bind_control(encoded(value), tag=TAG)


@given(BODIES)
def test_any_run_is_bound_or_refused(value: dict[str, object]) -> None:
    """Whatever JSON comes, what goes on carries the tag in `config.thread_id`, or a problem is told."""
    try:
        body, thread_id = bind(value)
    except Problem as problem:
        assert 400 <= problem.status < 500  # noqa: PT017  which problem it is, is the claim
        return

    assert body["config"]["thread_id"] == thread_id
    assert thread_id.startswith(f"{TAG}~")
    assert not {key for key in body["config"] if key in REFUSED_CONFIG | OVERWRITTEN_CONFIG or key.startswith("_")}
    assert 1 <= body["recursion_limit"] <= 50
    assert set(body) <= set(value) - {"text", "thread_id"} | {"messages", "config", "recursion_limit"}
    assert all(message["role"] in ("user", "assistant", "tool") for message in body.get("messages", []))


@given(BODIES)
def test_what_was_bound_binds_again_to_itself(value: dict[str, object]) -> None:
    """Sending back what was sent on reaches the same thread and changes nothing more."""
    try:
        body, thread_id = bind(value)
    except Problem:
        return

    assert bind(body) == (body, thread_id)


@given(st.fixed_dictionaries({}, optional={"thread_id": VALUES, "config": CONFIGS, "more": VALUES}))
def test_any_stop_is_bound_or_refused(value: dict[str, object]) -> None:
    """Whatever JSON comes, what goes on names the caller's thread at its top and none in `config`."""
    try:
        raw, thread_id = bind_control(encoded(value), tag=TAG)
    except Problem as problem:
        assert 400 <= problem.status < 500  # noqa: PT017  which problem it is, is the claim
        return

    body = json.loads(raw)
    assert set(body) == {"thread_id", "config"}
    assert body["thread_id"] == thread_id
    assert thread_id.startswith(f"{TAG}~")
    assert "thread_id" not in body["config"]


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | BODIES.map(encoded), st.data())
def test_any_bytes_are_bound_or_refused(raw: bytes, choices: st.DataObject) -> None:
    """No bytes, and no JSON with bytes changed, end in anything but a bound body or a problem."""
    damaged = bytearray(raw)
    if damaged and choices.draw(st.booleans()):
        damaged[choices.draw(st.integers(0, len(raw) - 1))] = choices.draw(st.integers(0, 255))
    bound: list[str] = []

    for binding in (
        lambda: bind_run(bytes(damaged), tag=TAG, rules=RULES, new_name=lambda: "new"),
        lambda: bind_control(bytes(damaged), tag=TAG),
    ):
        try:
            bound.append(binding()[1])
        except Problem:
            continue

    assert all(thread_id.startswith(f"{TAG}~") for thread_id in bound)
