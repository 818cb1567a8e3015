"""Whose a thread id is: every id gets its owner's tag, and no id of another's passes."""

import json
import re
import string
from collections.abc import Mapping

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.authentication import Authenticator
from proxy.claims import ClaimRules, accept_claims
from proxy.credentials import ApiKey, digest_of, make_key, parse_key
from proxy.errors import BodyInvalid, CredentialInvalid, NotFound, Problem
from proxy.keycache import KeyCache
from proxy.model import Principal
from proxy.storedkeys import StoredKey
from proxy.tenancy import SEPARATOR, bind_parameters, qualify, tag_of

SECRET = b"a secret of thirty-two bytes....."
TAG = tag_of("jwt:0::alice", SECRET)
OTHER = tag_of("jwt:0::bob", SECRET)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:@+=-]{0,127}", fullmatch=True)
IDS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.text(string.ascii_letters + "~.- \u2003\t\x1c", max_size=20)
    | NAMES
    | NAMES.map(lambda name: f"{TAG}~{name}")
    | NAMES.map(lambda name: f"{OTHER}~{name}")
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("support-42", "support-42"),
        ("  support-42\n", "support-42"),
        ("\u2003x\u00a0", "x"),
        (f"{TAG}~support-42", "support-42"),
        (f" {TAG}~support-42 ", "support-42"),
        (0, "0"),
        (42, "42"),
        (10**18 - 1, "999999999999999999"),
        ("0", "0"),
        ("_a.b:c@d+e=f-g", "_a.b:c@d+e=f-g"),
        ("a" * 128, "a" * 128),
        (TAG, TAG),
    ],
)
def test_an_id_gets_its_owners_tag(value: object, name: str) -> None:
    """A bare name is the caller's own, text or number; what carries his tag already is itself."""
    assert qualify(value, TAG) == f"{TAG}~{name}"


@pytest.mark.parametrize("value", [None, "", " ", "\t\r\n\u2003"])
def test_a_blank_id_is_none(value: object) -> None:
    """An absent or blank id names no thread, as the sidecar sees it."""
    assert qualify(value, TAG) is None


@pytest.mark.parametrize(
    "value",
    [
        f"{OTHER}~x",
        "~x",
        f"{TAG.upper()}~x",
        f"{TAG}~{OTHER}~x",
        f"{OTHER}~{TAG}~x",
        f"~{TAG}~x",
        f"{TAG} ~x",
        f"{TAG[:-1]}~x",
        f"{TAG}a~x",
        f"{TAG}\x00~x",
        "é~x",
        "\udc80~x",
        f"{OTHER}~",
    ],
)
def test_an_id_of_anothers_is_not_found(value: str) -> None:
    """A tag that is not the caller's, however near, looks like a thread that does not exist."""
    with pytest.raises(NotFound):
        qualify(value, TAG)


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        1.0,
        float("nan"),
        [],
        ["a"],
        {},
        b"a",
        -1,
        10**18,
        pytest.param(10**5000, id="beyond printing"),
        "-a",
        ".a",
        "..",
        "a/b",
        "a b",
        "a\nb",
        "a\x00",
        "a%2fb",
        "é",
        "\uff41",
        "\u0661",
        "a" * 129,
        f"{TAG}~",
        f"{TAG}~ x",
        f"{TAG}~é",
        f"{TAG}~-x",
    ],
)
def test_what_is_no_id_is_refused(value: object) -> None:
    """An id is text of a plain alphabet or a small number; nothing else is made into one."""
    with pytest.raises(BodyInvalid):
        qualify(value, TAG)


@given(IDS)
def test_qualifying_is_total_and_idempotent(value: object) -> None:
    """Any value is refused, blank, or an id under the tag and nothing further; and a second time changes nothing."""
    try:
        bound = qualify(value, TAG)
    except Problem:
        return

    assert bound is None or re.fullmatch(rf"{TAG}~[A-Za-z0-9_][A-Za-z0-9_.:@+=-]{{0,127}}", bound, re.ASCII)
    assert qualify(bound, TAG) == bound


@given(IDS)
def test_no_two_tags_share_a_thread(value: object) -> None:
    """What binds for one tag is another thread for another, or is refused there."""
    try:
        mine = qualify(value, TAG)
    except Problem:
        return
    assume(mine is not None)

    try:
        theirs = qualify(value, OTHER)
    except NotFound:
        theirs = None

    assert mine != theirs
    with pytest.raises(NotFound):
        qualify(mine, OTHER)


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_tag_is_a_namespaces_own(one: str, other: str) -> None:
    """One namespace has one tag, 16 characters that no name can be mistaken for; two have two."""
    tags = [tag_of(one, SECRET), tag_of(one, SECRET), tag_of(other, SECRET)]

    assert tags[0] == tags[1]
    assert (tags[0] == tags[2]) == (one == other)
    assert re.fullmatch(r"[a-z2-7]{16}", tags[0])
    assert SEPARATOR not in tags[0]


def test_a_tag_is_the_same_for_ever() -> None:
    """Tags are what threads are kept under: they never change while the secret does not."""
    tags = [tag_of("jwt:0::alice", SECRET), tag_of("jwt:0::alice", SECRET + b".")]

    assert tags == ["7hxdkeeeszuby3wl", "nor2ciaquvnelahr"]


@given(
    st.tuples(st.none() | st.text("a:1", max_size=6), st.text("a:1", min_size=1, max_size=6)),
    st.tuples(st.none() | st.text("a:1", max_size=6), st.text("a:1", min_size=1, max_size=6)),
)
def test_two_subjects_never_share_a_namespace(one: tuple[str | None, str], other: tuple[str | None, str]) -> None:
    """Issuer and subject cannot be shifted into one another; no issuer is the empty one."""
    namespaces = [
        _principal_of({"sub": subject} | ({} if issuer is None else {"iss": issuer})).namespace
        for issuer, subject in (one, other)
    ]

    assert (namespaces[0] == namespaces[1]) == ((one[0] or "", one[1]) == (other[0] or "", other[1]))


@given(st.text(min_size=1, max_size=255))
def test_a_key_and_a_token_never_share_a_namespace(subject: str) -> None:
    """A subject that is named as a key is still not the key."""
    key = make_key(lambda alphabet: alphabet[0])
    stored = StoredKey("0" * 12, "ci", digest_of(key), frozenset())
    by_key = Authenticator(tokens=None, keys=KeyCache(pinned=[stored])).recall(ApiKey(key))
    assert parse_key(key) is not None
    assert by_key is not None

    namespaces: list[str] = []
    for claims in ({"sub": subject}, {"sub": f"key:{subject}"}, {"sub": "0" * 12, "iss": "key"}):
        try:
            namespaces.append(_principal_of(claims).namespace)
        except CredentialInvalid:
            continue

    assert by_key.namespace not in namespaces


@given(
    st.dictionaries(
        st.sampled_from(["sub", "iss", "scope", "scopes"]),
        st.none() | st.integers() | st.text(st.characters(), max_size=10) | st.lists(st.text(max_size=3), max_size=2),
    )
)
def test_every_proven_principal_can_have_a_tag(claims: Mapping[str, object]) -> None:
    """Claims are refused, or their principal has a tag: a signed token is never a crash."""
    try:
        principal = _principal_of(claims)
    except CredentialInvalid:
        return

    tag = tag_of(principal.namespace, SECRET)

    assert len(tag) == 16


def test_an_issuer_that_is_no_text_is_refused() -> None:
    """A lone surrogate, which JSON can carry and UTF-8 cannot, is no issuer."""
    claims = json.loads(r'{"sub": "alice", "iss": "\ud800"}')

    with pytest.raises(CredentialInvalid):
        _principal_of(claims)


def test_parameters_are_bound() -> None:
    """A path's thread id is qualified; another id stays as it is."""
    bound = bind_parameters({"thread_id": " support-42", "message_id": "m:1.a-B_2"}, TAG)

    assert bound == {"thread_id": f"{TAG}~support-42", "message_id": "m:1.a-B_2"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"thread_id": ""},
        {"thread_id": " "},
        {"thread_id": f"{OTHER}~x"},
        {"thread_id": "a/b"},
        {"thread_id": "a", "message_id": ""},
        {"thread_id": "a", "message_id": "a/b"},
        {"thread_id": "a", "message_id": "a b"},
        {"thread_id": "a", "message_id": "a\n"},
        {"thread_id": "a", "message_id": "a~b"},
        {"thread_id": "a", "message_id": "é"},
        {"thread_id": "a", "message_id": "a%2e"},
        {"thread_id": "a", "message_id": "a" * 129},
        {"message_id": "a?b"},
    ],
)
def test_a_path_that_names_nothing_of_ones_own_is_not_found(parameters: Mapping[str, str]) -> None:
    """In a path, what is no id looks like what does not exist; the two are never told apart."""
    with pytest.raises(NotFound):
        bind_parameters(parameters, TAG)


@pytest.mark.parametrize("value", [".", ".."])
def test_a_dot_segment_is_no_id(value: str) -> None:
    """An id that a path would swallow cannot stand in the sidecar's path, whoever let it come so far."""
    with pytest.raises(NotFound):
        bind_parameters({"thread_id": "a", "message_id": value}, TAG)


@given(st.dictionaries(st.sampled_from(["thread_id", "message_id", "name"]), st.text(max_size=20) | NAMES))
def test_any_parameters_are_bound_or_not_found(parameters: Mapping[str, str]) -> None:
    """Every parameter is bound, the thread id under the tag, or nothing is."""
    try:
        bound = bind_parameters(parameters, TAG)
    except NotFound:
        return

    assert set(bound) == set(parameters)
    assert all(bound.values())
    assert bound.get("thread_id", f"{TAG}~").startswith(f"{TAG}~")


def _principal_of(claims: Mapping[str, object]) -> Principal:
    """Read the principal from proven claims of any issuer."""
    return accept_claims({"exp": 100} | dict(claims), ClaimRules(), 0).principal
