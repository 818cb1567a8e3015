"""The form of an API key: made, taken apart, and refused at a typo before anything is looked up."""

import hashlib
import string
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.credentials import KEY_PREFIX, KeyParts, digest_of, digests_match, make_key, parse_key

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEYS = st.integers(0, 2**32).map(lambda seed: make_key(Random(seed).choice))  # noqa: S311  test keys
KNOWN = "afp_000000000000_" + "0" * 27 + "04BRnp"


def test_a_key_looks_the_same_for_ever() -> None:
    """Keys that were handed out stay valid: prefix, id, secret and checksum are as they always were."""
    made = make_key(lambda alphabet: alphabet[0])

    assert made == KNOWN
    assert parse_key(KNOWN) == KeyParts("0" * 12, hashlib.sha256(KNOWN.encode()).hexdigest())


@given(KEYS)
def test_a_made_key_can_be_taken_apart(key: str) -> None:
    """Every key that is made has the form that is read, and its digest is of the whole key."""
    parts = parse_key(key)

    assert parts is not None
    assert parts.id == key.split("_")[1]
    assert parts.digest == hashlib.sha256(key.encode()).hexdigest()
    assert len(key) == len(KNOWN)


def test_every_character_is_drawn() -> None:
    """Id and secret are 39 characters drawn from 62 each: more than 160 bits of them secret."""
    drawn: list[str] = []

    make_key(lambda alphabet: drawn.append(alphabet) or alphabet[-1])

    assert [len(alphabet) for alphabet in drawn] == [62] * 39
    assert set(drawn[0]) == set(ALPHABET)


@given(KEYS, st.data())
def test_one_wrong_character_is_found(key: str, data: st.DataObject) -> None:
    """The checksum finds every single substitution, so that a typo costs no look-up."""
    place = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.sampled_from([letter for letter in ALPHABET + "_-é" if letter != key[place]]))

    parts = parse_key(key[:place] + other + key[place + 1 :])

    assert parts is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        KEY_PREFIX,
        "___",
        KNOWN[:-1],
        KNOWN + "0",
        " " + KNOWN,
        KNOWN + "\n",
        KNOWN.upper(),
        KNOWN.replace("afp", "sk"),
        KNOWN.replace("_", "-"),
        KNOWN.replace("_0", "_\u0660", 1),
        "afp_0000000_00000_" + "0" * 27 + "04BRnp",
        "afp_0000000000000_" + "0" * 26 + "04BRnp",
    ],
)
def test_another_form_is_no_key(text: str) -> None:
    """Length, prefix, alphabet and underscores are all as made, or it is no key."""
    assert parse_key(text) is None


@given(st.text() | st.text(ALPHABET + "_", min_size=48, max_size=50).map(lambda tail: "afp_" + tail))
def test_any_text_is_a_key_or_none(text: str) -> None:
    """No text makes the reading fail."""
    parts = parse_key(text)

    assert parts is None or parts.digest == digest_of(text)


@pytest.mark.parametrize(
    ("presented", "matches"), [("a" * 64, True), ("a" * 63, False), ("a" * 63 + "b", False), ("", False)]
)
def test_digests_match_when_they_are_the_same(presented: str, matches: bool) -> None:
    """Two digests match when every digit does."""
    assert digests_match(presented, "a" * 64) is matches
