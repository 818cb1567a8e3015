"""The short token that tells the sidecar who calls."""

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import CredentialKind, Principal
from proxy.tokens import INTERNAL_LIFETIME, InternalIdentity

SECRET = "i" * 32
ALICE = Principal("alice", "alice", "jwt:0::alice", frozenset({"agent:invoke"}), CredentialKind.JWT)
BOB = Principal("bob", "bob", "key:BBBBBBBBBBBB", frozenset(), CredentialKind.API_KEY)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def claims_of(token: bytes) -> dict[str, object]:
    """Read a token as the sidecar would, but for its times."""
    options = {"verify_exp": False, "verify_iat": False, "verify_aud": False}
    return jwt.decode(token, SECRET, ["HS256"], options=options)


def test_the_sidecar_is_told_who_calls() -> None:
    """The namespace is the user, the subject is the subject, and nothing of the caller's credential is there."""
    identity = InternalIdentity(SECRET, issuer="us", audience="agent", clock=Clock(1000.9))

    claims = claims_of(identity.token(ALICE))

    assert claims == {
        "user_id": "jwt:0::alice",
        "sub": "alice",
        "iss": "us",
        "aud": "agent",
        "iat": 1000,
        "exp": 1000 + INTERNAL_LIFETIME,
    }


@pytest.mark.parametrize(("issuer", "audience"), [(None, None), ("us", None), (None, "agent")])
def test_what_is_not_configured_is_not_claimed(issuer: str | None, audience: str | None) -> None:
    """A sidecar without an audience refuses a token that has one."""
    identity = InternalIdentity(SECRET, issuer=issuer, audience=audience, clock=Clock(1000))

    claims = claims_of(identity.token(ALICE))

    assert (claims.get("iss"), claims.get("aud")) == (issuer, audience)
    assert None not in claims.values()


def test_each_principal_has_a_token_of_his_own() -> None:
    """A token is never reused for another caller."""
    identity = InternalIdentity(SECRET, issuer=None, audience=None, clock=Clock(1000))

    users = [claims_of(identity.token(principal))["user_id"] for principal in (ALICE, BOB, ALICE)]

    assert users == [ALICE.namespace, BOB.namespace, ALICE.namespace]


def test_a_token_is_reused_for_half_its_life() -> None:
    """Signing is saved while the last token is young."""
    clock = Clock(1000)
    identity = InternalIdentity(SECRET, issuer=None, audience=None, clock=clock)

    tokens = []
    for clock.now in (1000, 1029, 1030, 1031):
        tokens.append(identity.token(ALICE))

    assert tokens[0] == tokens[1]
    assert tokens[1] != tokens[2]
    assert tokens[2] == tokens[3]


@given(st.lists(st.floats(0, 40), max_size=6), st.floats(1e9, 2e9))
def test_a_token_always_has_half_its_life_before_it(steps: list[float], start: float) -> None:
    """At whatever moment it is asked for, a token lives another 30 s at least, and 60 s at most."""
    clock = Clock(start)
    identity = InternalIdentity(SECRET, issuer=None, audience=None, clock=clock)

    lives = []
    for step in [0.0, *steps]:
        clock.now += step
        lives.append(claims_of(identity.token(ALICE))["exp"] - clock.now)

    assert all(INTERNAL_LIFETIME / 2 <= life <= INTERNAL_LIFETIME for life in lives)
