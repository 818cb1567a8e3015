"""Finding the one credential among a request's raw header fields."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.credentials import MAX_CREDENTIAL_BYTES, ApiKey, BearerToken, Credential, read_credential
from proxy.errors import MalformedCredential

VISIBLE = string.ascii_letters + string.digits + string.punctuation
NAMES = st.sampled_from([b"authorization", b"x-api-key", b"cookie", b"proxy-authorization", b"authorization2"])
VALUES = st.one_of(
    st.binary(max_size=40),
    st.text(VISIBLE, max_size=40).map(str.encode),
    st.text(VISIBLE, max_size=40).map(lambda text: b"Bearer " + text.encode()),
)


@pytest.mark.parametrize(
    ("headers", "credential"),
    [
        ([], None),
        ([(b"accept", b"*/*"), (b"cookie", b"authorization=Bearer x")], None),
        ([(b"authorization", b"Bearer a.b.c")], BearerToken("a.b.c")),
        ([(b"authorization", b"bearer a.b.c")], BearerToken("a.b.c")),
        ([(b"authorization", b"BEARER a.b.c")], BearerToken("a.b.c")),
        ([(b"x-api-key", b"afp_x")], ApiKey("afp_x")),
        ([(b"accept", b"*/*"), (b"x-api-key", b"Bearer:x"), (b"te", b"")], ApiKey("Bearer:x")),
        ([(b"authorization", b"Bearer " + b"a" * MAX_CREDENTIAL_BYTES)], BearerToken("a" * MAX_CREDENTIAL_BYTES)),
        ([(b"x-api-key", b"!~")], ApiKey("!~")),
    ],
)
def test_a_credential_is_found(headers: list[tuple[bytes, bytes]], credential: Credential | None) -> None:
    """One field in either form is the credential; no field is none, which is not an error."""
    found = read_credential(headers)

    assert found == credential
    assert type(found) is type(credential)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer a")],
        [(b"x-api-key", b"a"), (b"x-api-key", b"a")],
        [(b"authorization", b"Bearer a"), (b"x-api-key", b"b")],
        [(b"x-api-key", b"b"), (b"accept", b"*/*"), (b"authorization", b"Bearer a")],
    ],
)
def test_two_credentials_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    """Which of two would count is never chosen, be they the same twice."""
    with pytest.raises(MalformedCredential) as refused:
        read_credential(headers)

    assert "exactly one" in refused.value.detail


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer  a",
        b"Bearer a b",
        b"Bearer a, Bearer b",
        b"Bearer\ta",
        b" Bearer a",
        b"Basic dTpw",
        b"a.b.c",
        b"ApiKey a",
        b"Bearer a\x00",
        b"Bearer a\x7f",
        b"Bearer \xc3\xa9",
        b"Bearer a\n",
        b"Bearer a\t",
        b"Bearer " + b"a" * (MAX_CREDENTIAL_BYTES + 1),
    ],
)
def test_another_authorization_is_refused(value: bytes) -> None:
    """Only `Bearer`, one space and visible ASCII of a bounded length are read."""
    with pytest.raises(MalformedCredential):
        read_credential([(b"authorization", value)])


@pytest.mark.parametrize("value", [b"", b" ", b"a b", b"a ", b"\xff", b"a\r", b"\x7f", b"a" * 8193])
def test_an_unreadable_key_is_refused(value: bytes) -> None:
    """A key field has visible ASCII characters only, as a token does."""
    with pytest.raises(MalformedCredential):
        read_credential([(b"x-api-key", value)])


@given(st.lists(st.tuples(NAMES, VALUES), max_size=4))
def test_any_headers_are_read_or_refused(headers: list[tuple[bytes, bytes]]) -> None:
    """Whatever is sent is no credential, one whose text stood in the request, or the one refusal."""
    sent = [value for name, value in headers if name in (b"authorization", b"x-api-key")]

    try:
        found = read_credential(headers)
    except MalformedCredential:
        assert sent
        return

    assert (found is None) == (not sent)
    if found is not None:
        assert len(sent) == 1
        assert sent[0].endswith(found.text.encode())
        assert found.text
        assert set(found.text) <= set(VISIBLE)


@pytest.mark.parametrize("credential", [BearerToken("s3cret-token"), ApiKey("s3cret-token")])
def test_a_credential_never_shows_itself(credential: Credential) -> None:
    """A credential that is printed by accident, alone or inside something else, tells nothing."""
    shown = f"{credential} {credential!r} {[credential]}"

    assert "s3cret" not in shown
