"""The file of API keys that an operator writes: read whole, or refused with every fault in it."""

import re
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.credentials import make_key
from proxy.keys import entry_text, parse_digest_lines, parse_import, parse_keys
from proxy.operations import SCOPES
from proxy.storedkeys import StoredKey

DIGEST = "0123456789abcdef" * 4
ALICE = StoredKey("AAAAAAAAAAAA", "alice", DIGEST, frozenset({"agent:invoke", "threads:read"}))
BOB = StoredKey("BBBBBBBBBBBB", "bob.2_x-y", DIGEST, frozenset({"agent:ping"}))


def _entry(
    *, name: str = '"alice"', digest: str = f'"sha256:AAAAAAAAAAAA:{DIGEST}"', scopes: str = "[]", more: str = ""
) -> str:
    return f"[[keys]]\nname = {name}\ndigest = {digest}\nscopes = {scopes}\n{more}"


def _written(key: StoredKey) -> str:
    return entry_text(name=key.name, key_id=key.id, digest=key.digest, scopes=key.scopes)


def test_entries_are_read_in_order() -> None:
    """The text holds one table for each key, and comments are the operator's."""
    text = "# ours\n" + _written(ALICE) + "\n" + _written(BOB)

    keys = parse_keys(text)

    assert keys == (ALICE, BOB)


@pytest.mark.parametrize("remark", ["", "# ours\n", "\n  # sha256:\n\n"])
def test_either_form_is_imported(remark: str) -> None:
    """Remarks before the first key do not make a file one of the other form."""
    line = f"sha256:AAAAAAAAAAAA:{DIGEST} alice agent:invoke,threads:read\n"

    assert parse_import(remark + line) == parse_import(remark + _written(ALICE)) == (ALICE,)


@given(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    st.from_regex(r"[0-9A-Za-z]{12}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    st.frozensets(st.sampled_from(sorted(SCOPES))),
)
def test_what_is_written_is_read(name: str, key_id: str, digest: str, scopes: frozenset[str]) -> None:
    """An entry that the command prints means the key that it was printed for."""
    text = entry_text(name=name, key_id=key_id, digest=digest, scopes=scopes)

    keys = parse_keys(text)

    assert keys == (StoredKey(key_id, name, digest, scopes),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys", "not TOML"),
        ("", "keys: Field required"),
        ("keys = 1", "keys:"),
        ("keys = []\nkey = 2", "key: Extra inputs are not permitted"),
        (_entry(more="owner = 'x'"), "keys.0.owner: Extra inputs"),
        (_entry(more="tier = ''"), "keys.0.tier"),
        (_entry(more="rate = 'often'"), "keys.0.rate"),
        (_entry(more="rate = '0/minute'"), "keys.0.rate"),
        (_entry(more="expires = 2030-01-01T00:00:00"), "keys.0.expires"),
        ("[[keys]]", "keys.0.name: Field required; keys.0.digest: Field required; keys.0.scopes: Field required"),
        (_entry(name='""'), "keys.0.name"),
        (_entry(name='"a b"'), "keys.0.name"),
        (_entry(name='"-a"'), "keys.0.name"),
        (_entry(name='"alice\\n"'), "keys.0.name"),
        (_entry(name=f'"{"a" * 65}"'), "keys.0.name"),
        (_entry(scopes='["agent:invoke", "agent:fix"]'), "unknown: agent:fix; known: agent:impersonate"),
        (_entry(scopes='"agent:invoke"'), "keys.0.scopes"),
        (_entry(digest=f'"{DIGEST}"'), "must be sha256:"),
        (_entry(digest=f'"sha256:AAAAAAAAAAAA:{DIGEST[1:]}"'), "must be sha256:"),
        (_entry(digest=f'"sha256:AAAAAAAAAAAA:{DIGEST.upper()}"'), "must be sha256:"),
        (_entry(digest=f'"sha256:AAAAAAAAAAA:{DIGEST}"'), "must be sha256:"),
        (_entry(digest=f'"sha512:AAAAAAAAAAAA:{DIGEST}"'), "must be sha256:"),
        (_entry(digest=f'" sha256:AAAAAAAAAAAA:{DIGEST}"'), "must be sha256:"),
        (_written(ALICE) * 2, "two keys share their names"),
        (_written(ALICE) + _written(ALICE).replace("alice", "bob"), "two keys share their ids"),
        (_written(ALICE) + _written(BOB).replace("bob.2_x-y", "alice"), "two keys share their names"),
    ],
)
def test_a_fault_is_named(text: str, told: str) -> None:
    """What is not exactly a key file is refused, and the fault has a place."""
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_keys(text)


def test_a_digest_ends_where_it_ends() -> None:
    """A line end after the digest would make a key that nothing ever matches; it is refused."""
    text = _entry(digest=f'"sha256:AAAAAAAAAAAA:{DIGEST}\\n"')

    with pytest.raises(ValueError, match="must be sha256:"):
        parse_keys(text)


def test_all_faults_are_named_at_once() -> None:
    """One reading tells everything that has to be put right."""
    text = _entry(name='"?"', scopes='["x"]') + _entry(digest='"y"')

    with pytest.raises(ValueError, match="keys") as refused:
        parse_keys(text)

    for place in ("keys.0.name", "keys.0.scopes", "keys.1.digest"):
        assert place in str(refused.value)


def test_a_file_without_a_bottom_is_refused() -> None:
    """A text nested deeper than anyone writes is a fault like any other."""
    with pytest.raises(ValueError, match="not TOML"):
        parse_keys("keys = " + "[" * 3000)


@given(st.text())
def test_any_text_is_keys_or_refused(text: str) -> None:
    """No text fails in another way than by ValueError."""
    try:
        keys = parse_keys(text)
    except ValueError:
        return

    assert keys == ()


def test_what_a_key_may_do_is_read_with_it() -> None:
    """Tier, rate and expiry are an entry's own; the expiry is a moment, with its zone."""
    text = _entry(more="tier = 'gold'\nrate = '10/second;600/minute'\nexpires = 2030-01-01T01:00:00+01:00")

    (key,) = parse_keys(text)

    assert (key.tier, key.rate, key.expires) == ("gold", "10/second;600/minute", 1_893_456_000)


def test_digest_lines_are_read() -> None:
    """One key a line, comments and empty lines aside."""
    alice = f"sha256:AAAAAAAAAAAA:{DIGEST} alice agent:invoke,threads:read"
    bob = f"sha256:BBBBBBBBBBBB:{DIGEST} bob.2_x-y agent:ping"

    assert parse_digest_lines(f"# ours\n{alice}\n\n{bob}") == (ALICE, BOB)


@pytest.mark.parametrize("line", ["x", "sha256:A:b c d", f"sha256:AAAAAAAAAAAA:{DIGEST} alice", "a b c d"])
def test_a_faulty_digest_line_is_named(line: str) -> None:
    """The line's number is told."""
    with pytest.raises(ValueError, match="line 2: "):
        parse_digest_lines(f"# first\n{line}\n")


@pytest.mark.parametrize("later", ["alice agent:stop", "bob agent:ping"])
def test_a_later_line_does_not_speak_for_an_earlier(later: str) -> None:
    """Of two lines with one id the last would win unsaid, with its scopes; so neither is read."""
    lines = f"sha256:AAAAAAAAAAAA:{DIGEST} alice agent:ping\nsha256:AAAAAAAAAAAA:{DIGEST} {later}"

    with pytest.raises(ValueError, match="two keys share their"):
        parse_digest_lines(lines)


@pytest.mark.parametrize("write", ['{} = "alice"', '[[keys]]\n{} = "alice"', '[[keys]]\nscopes = ["{}"]'])
def test_a_key_in_the_wrong_place_is_not_told(write: str) -> None:
    """Who writes the key itself where its digest belongs finds the fault, and the key in no log of it."""
    key = make_key(secrets.choice)

    with pytest.raises(ValueError, match="afp_…") as refused:
        parse_keys(write.format(key))

    assert key.split("_")[2] not in str(refused.value)
