"""Proving a caller's JSON Web Token, and remembering it no longer than it lives."""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.claims import MAX_SUBJECT_LENGTH, ClaimRules, accept_claims
from proxy.errors import CredentialInvalid
from proxy.issuers import Issuer, shared_secret_issuer
from proxy.model import CredentialKind, Principal
from proxy.publickeys import KnownKeys
from proxy.tokens import Memory, TokenVerifier, issue_token

SECRET = "s" * 64
FAR = 4_102_444_800
"""The first second of the year 2100: for tokens that have not expired while these tests are run."""
RULES = shared_secret_issuer([SECRET], ClaimRules(leeway=10))
STRICT = shared_secret_issuer([SECRET], ClaimRules(issuer="https://issuer.test", audience="proxy", leeway=10))
CLAIMS: Mapping[str, Any] = {"sub": "alice", "exp": FAR, "scope": "agent:invoke threads:read"}
STRICT_CLAIMS: Mapping[str, Any] = CLAIMS | {"iss": "https://issuer.test", "aud": "proxy"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float = FAR - 3600) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def verifier(issuer: Issuer = RULES, clock: Clock | None = None) -> TokenVerifier:
    """Make a verifier; unless told otherwise it is an hour before every token's end."""
    return TokenVerifier([(issuer, KnownKeys(issuer.keys))], clock or Clock())


def prove(proving: TokenVerifier, token: str) -> Principal:
    """Prove a token whose keys are known, which never waits."""
    with pytest.raises(StopIteration) as ended:
        proving.prove(token).send(None)
    principal: Principal = ended.value.value
    return principal


def principal_of(claims: Mapping[str, Any]) -> Principal:
    """Read the principal from claims that have not expired."""
    return accept_claims({"exp": FAR} | dict(claims), ClaimRules(), FAR - 3600).principal


def signed(claims: Mapping[str, Any], **header: object) -> str:
    """Sign a token as an issuer would."""
    return jwt.encode(dict(claims), SECRET, "HS256", headers=dict(header))


def sealed(header: bytes, payload: bytes, secret: str = SECRET) -> str:
    """Sign any bytes at all as a token (RFC 7515 §5.1)."""
    stem = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (header, payload))
    seal = hmac.digest(secret.encode(), stem.encode(), "sha256")
    return f"{stem}.{base64.urlsafe_b64encode(seal).rstrip(b'=').decode()}"


def test_a_token_proves_its_subject() -> None:
    """Subject, scopes and the namespace that owns the threads come out of a proven token."""
    principal = prove(verifier(), signed(CLAIMS))

    assert principal == Principal(
        subject="alice",
        name="alice",
        namespace="jwt:0::alice",
        scopes=frozenset({"agent:invoke", "threads:read"}),
        kind=CredentialKind.JWT,
    )


@pytest.mark.parametrize("audience", ["proxy", ["other", "proxy"]])
def test_a_configured_issuer_and_audience_are_met(audience: object) -> None:
    """A token that names them is proven, and its issuer is part of its namespace."""
    principal = prove(verifier(STRICT), signed(STRICT_CLAIMS | {"aud": audience}))

    assert principal.namespace == "jwt:19:https://issuer.test:alice"


@pytest.mark.parametrize("left_out", ["exp", "sub", "iss", "aud"])
def test_a_token_has_all_that_is_required(left_out: str) -> None:
    """Expiry and subject always, issuer and audience where configured: none may be absent."""
    token = signed({name: value for name, value in STRICT_CLAIMS.items() if name != left_out})

    with pytest.raises(CredentialInvalid):
        prove(verifier(STRICT), token)


@pytest.mark.parametrize(
    "changed",
    [
        {"iss": "https://issuer.test/"},
        {"iss": "https://evil.test"},
        {"iss": ""},
        {"iss": ["https://issuer.test"]},
        {"aud": "other"},
        {"aud": []},
        {"aud": ["other"]},
        {"aud": {"proxy": 1}},
        {"exp": 0},
        {"exp": 1_000_000_000},
        {"exp": -1},
        {"exp": "never"},
        {"exp": str(FAR)},
        {"exp": None},
        {"exp": True},
        {"exp": [FAR]},
        {"nbf": FAR},
        {"nbf": "x"},
        {"nbf": True},
        {"nbf": -1},
        {"iat": True},
        {"iat": -1},
        {"exp": 253_402_300_800},
        {"iat": "x"},
        {"sub": ""},
        {"sub": 7},
        {"sub": None},
        {"sub": ["alice"]},
        {"sub": "a\nb"},
        {"sub": "a\x00"},
        {"sub": "\u202ea"},
        {"sub": "a" * (MAX_SUBJECT_LENGTH + 1)},
        {"scope": 7},
        {"scope": None},
        {"scope": {"agent:invoke": True}},
        {"scope": ["agent:invoke", 7]},
    ],
    ids=repr,
)
def test_one_wrong_claim_proves_nothing(changed: Mapping[str, Any]) -> None:
    """Signed or not: a claim that is wrong, of another kind, or of another's making refuses the token."""
    with pytest.raises(CredentialInvalid):
        prove(verifier(STRICT), signed_raw(STRICT_CLAIMS | changed))


def signed_raw(claims: Mapping[str, Any]) -> str:
    """Sign claims that an honest library would not."""
    return sealed(b'{"alg":"HS256","typ":"JWT"}', json.dumps(dict(claims)).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b"1",
        b'"x"',
        b"null",
        b"",
        b"{",
        b"\xff",
        b"[" * 3000,
        b'{"exp":1e999,"sub":"a"}',
        b'{"exp":NaN,"sub":"a"}',
        b'{"exp":' + b"9" * 5000 + b',"sub":"a"}',
    ],
    ids=lambda payload: repr(payload[:12]),
)
def test_a_payload_that_is_no_claims_proves_nothing(payload: bytes) -> None:
    """What was signed must still be a JSON object with a time in it."""
    with pytest.raises(CredentialInvalid):
        prove(verifier(), sealed(b'{"alg":"HS256"}', payload))


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "hs256"},
        {"alg": "HS384"},
        {"alg": "HS512"},
        {"alg": "RS256"},
        {"alg": "ES256"},
        {"alg": "EdDSA"},
        {"alg": ""},
        {"alg": None},
        {"alg": ["HS256"]},
        {"alg": {"HS256": 1}},
        {},
        {"alg": "HS256", "crit": ["exp"]},
        {"alg": "HS256", "crit": ["b64"], "b64": True},
        {"alg": "HS256", "crit": []},
        {"alg": "HS256", "crit": None},
        {"alg": "HS256", "crit": "x"},
        {"alg": "HS256", "crit": ["http://x"], "http://x": 1},
        {"alg": "HS256", "b64": False},
        {"alg": "HS256", "kid": 7},
        [],
        7,
        None,
    ],
    ids=repr,
)
def test_another_header_proves_nothing(header: object) -> None:
    """One algorithm is pinned, and an extension that must be understood is not (RFC 7515 §4.1.11, RFC 8725 §3.1)."""
    token = sealed(json.dumps(header).encode(), json.dumps(dict(CLAIMS)).encode())

    with pytest.raises(CredentialInvalid):
        prove(verifier(), token)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_a_stronger_algorithm_is_another_algorithm(algorithm: str) -> None:
    """A token that is truly signed, but not by the pinned algorithm, proves nothing."""
    token = jwt.encode(dict(CLAIMS), SECRET, algorithm)

    with pytest.raises(CredentialInvalid):
        prove(verifier(), token)


def test_an_unsigned_token_proves_nothing() -> None:
    """`none` is no algorithm, with an empty signature or with one that someone made up."""
    stem = jwt.encode(dict(CLAIMS), None, "none")

    for token in (stem, stem.rstrip("."), stem + "AAAA"):
        with pytest.raises(CredentialInvalid):
            prove(verifier(), token)


@pytest.mark.parametrize("name", ["jku", "x5u", "x5c", "jwk"])
def test_a_key_in_the_header_is_refused(name: str) -> None:
    """A token that brings its key along, or says where it is, counts for nothing, not even when the key is ours."""
    value = {"kty": "oct", "k": base64.urlsafe_b64encode(b"e" * 64).decode()}
    header = json.dumps({"alg": "HS256", name: value}).encode()
    payload = json.dumps(dict(CLAIMS)).encode()

    for secret in (SECRET, "e" * 64):
        with pytest.raises(CredentialInvalid):
            prove(verifier(), sealed(header, payload, secret))


@pytest.mark.parametrize(
    "token", ["", ".", "..", "...", "a.b", "a.b.c", "a.b.c.d", "a.b.c.d.e", "!", "e30.e30.", "e30.e30.e30"]
)
def test_what_is_no_token_proves_nothing(token: str) -> None:
    """Fewer parts, more parts, or parts of nothing."""
    with pytest.raises(CredentialInvalid):
        prove(verifier(), token)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60))
def test_any_text_proves_nothing(token: str) -> None:
    """No text that a request can carry fails in another way than by proving nothing."""
    with pytest.raises(CredentialInvalid):
        prove(verifier(), token)


@given(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=10))
def test_any_header_proves_nothing(header: bytes, payload: bytes) -> None:
    """The header is read before anything is proven, so that whatever it holds must be survived."""
    with pytest.raises(CredentialInvalid):
        prove(verifier(), sealed(header, payload))


@given(
    st.fixed_dictionaries(
        {"sub": st.just("alice") | JSON, "exp": st.just(FAR) | JSON},
        optional=dict.fromkeys(("iss", "aud", "nbf", "iat", "jti", "scope", "scopes"), JSON),
    )
)
def test_any_signed_claims_prove_a_subject_or_nothing(claims: dict[str, object]) -> None:
    """Even what was truly signed is a principal with a printable subject, or refused."""
    try:
        principal = prove(verifier(), signed_raw(claims))
    except CredentialInvalid:
        return

    assert principal.subject == claims["sub"]
    assert principal.subject.isprintable()
    assert all(isinstance(scope, str) for scope in principal.scopes)


@given(st.data())
def test_one_changed_character_proves_nothing(choices: st.DataObject) -> None:
    """Header, payload and signature all count, to the last bit of them."""
    token = signed(CLAIMS)
    place = choices.draw(st.integers(0, len(token) - 1))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
    other = choices.draw(st.sampled_from(alphabet).filter(lambda letter: letter != token[place]))

    with pytest.raises(CredentialInvalid):
        prove(verifier(), token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({}, set()),
        ({"scope": ""}, set()),
        ({"scope": "a  b a"}, {"a", "b"}),
        ({"scopes": ["a", "b"]}, {"a", "b"}),
        ({"scopes": "a b"}, {"a", "b"}),
        ({"scope": "a", "scopes": ["b"]}, {"a"}),
        ({"scope": ["a b"]}, {"a b"}),
    ],
)
def test_scopes_are_text_or_a_list(claims: Mapping[str, object], scopes: set[str]) -> None:
    """Scopes stand in `scope` (RFC 8693 §4.2) or, where that is absent, in `scopes`."""
    principal = principal_of({"sub": "alice"} | dict(claims))

    assert principal.scopes == scopes


def test_a_subject_of_the_greatest_length_is_one() -> None:
    """255 characters, spaces and letters beyond ASCII among them."""
    subject = "Ålice B." + "x" * (MAX_SUBJECT_LENGTH - 8)

    assert principal_of({"sub": subject}).subject == subject


@pytest.mark.parametrize("issuer", [None, 7, ["x"], {}])
def test_an_issuer_is_text(issuer: object) -> None:
    """Even where no issuer is configured, what is claimed as one is text."""
    with pytest.raises(CredentialInvalid):
        principal_of({"sub": "alice", "iss": issuer})


def test_a_proven_token_is_recalled_until_it_expires() -> None:
    """Proof is remembered for the token's life and its leeway, to the second."""
    clock = Clock(FAR - 100)
    proving = verifier(clock=clock)
    token = signed(CLAIMS)

    before = proving.recall(token)
    proven = prove(proving, token)
    recalled = []
    for clock.now in (FAR - 1, FAR + 9.9, FAR + 10, FAR + 11):
        recalled.append(proving.recall(token))

    assert before is None
    assert recalled == [proven, proven, None, None]


def test_a_proven_token_is_remembered_for_a_day_at_most() -> None:
    """A token that never expires is proven anew every day."""
    clock = Clock(1_900_000_000)
    proving = verifier(clock=clock)
    token = signed(CLAIMS)

    proven = prove(proving, token)
    recalled = []
    for clock.now in (1_900_086_399, 1_900_086_400):
        recalled.append(proving.recall(token))

    assert recalled == [proven, None]


def test_what_proved_nothing_is_not_recalled() -> None:
    """A refused token is refused again, and one that differs in its signature is another."""
    proving = verifier()
    token = signed(CLAIMS)
    forged = token[:-4] + "AAAA"

    with pytest.raises(CredentialInvalid):
        prove(proving, forged)
    prove(proving, token)

    assert proving.recall(forged) is None


def is_proven(token: str, now: float) -> bool:
    """Say whether a verifier whose clock stands at `now` proves the token."""
    try:
        prove(verifier(clock=Clock(now)), token)
    except CredentialInvalid:
        return False
    return True


@pytest.mark.parametrize(
    ("now", "valid"),
    [(1_000_000_059, True), (1_000_000_069, True), (1_000_000_070, False), (1_000_000_071, False)],
)
def test_the_verifiers_clock_decides_what_has_expired(now: float, valid: bool) -> None:
    """A token is good until its expiry and the leeway, by the clock that the verifier was given."""
    token = signed(CLAIMS | {"exp": 1_000_000_060})

    assert is_proven(token, now) is valid


@pytest.mark.parametrize(("now", "valid"), [(1_000_000_000, False), (1_000_000_049, False), (1_000_000_050, True)])
def test_the_verifiers_clock_decides_what_has_begun(now: float, valid: bool) -> None:
    """A token is good from its `nbf` less the leeway on, by the same clock."""
    token = signed(CLAIMS | {"nbf": 1_000_000_060})

    assert is_proven(token, now) is valid


@pytest.mark.parametrize("name", ["nbf", "iat"])
@pytest.mark.parametrize("then", [0, FAR - 7200, FAR - 3600, FAR - 3590])
def test_a_token_that_began_by_the_verifiers_clock_is_good(name: str, then: int) -> None:
    """No other clock has a say: what has begun by the verifier's own, leeway forgiven, has begun."""
    principal = prove(verifier(clock=Clock(FAR - 3600)), signed(CLAIMS | {name: then}))

    assert principal.subject == "alice"


@pytest.mark.parametrize("name", ["nbf", "iat"])
def test_a_token_of_the_future_proves_nothing(name: str) -> None:
    """Beyond the leeway, what was made or begins later than now is not believed."""
    with pytest.raises(CredentialInvalid):
        prove(verifier(clock=Clock(FAR - 3600)), signed(CLAIMS | {name: FAR - 3589}))


def test_the_last_second_of_the_calendar_is_a_time() -> None:
    """A token may be good until the year 9999 is over."""
    assert prove(verifier(), signed(CLAIMS | {"exp": 253_402_300_799})).subject == "alice"


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    """What was kept longest ago goes first; keeping anew makes young again."""
    memory: Memory[str] = Memory(size=2)
    for key in (b"a", b"b", b"a", b"c"):
        memory.keep(key, key.decode(), expires=10)

    recalled = [memory.recall(key, now=0) for key in (b"a", b"b", b"c")]

    assert recalled == ["a", None, "c"]


@pytest.mark.parametrize(("now", "value"), [(0, "x"), (9.999, "x"), (10, None), (11, None)])
def test_memory_forgets_at_the_expiry(now: float, value: str | None) -> None:
    """What expires at an instant is no longer there at that instant."""
    memory: Memory[str] = Memory()
    memory.keep("key", "x", expires=10)

    assert memory.recall("key", now) == value


def test_an_issued_token_proves_what_it_was_issued_for() -> None:
    """The `token` command's tokens are good under the rules that they were made for, and for their lifetime."""
    token = issue_token(
        STRICT, subject="alice", scopes=frozenset({"b", "a"}), now=FAR - 3e9 + 0.5, lifetime=3_000_000_000
    )

    principal = prove(verifier(STRICT), token)
    claims = jwt.decode(token, options={"verify_signature": False})

    assert (principal.subject, principal.scopes) == ("alice", {"a", "b"})
    assert (claims["iat"], claims["exp"], claims["scope"]) == (FAR - 3_000_000_000, FAR, "a b")


def test_an_issued_token_names_only_what_is_configured() -> None:
    """Without an issuer and an audience in the rules there are none in the token."""
    token = issue_token(RULES, subject="alice", scopes=frozenset(), now=FAR - 60, lifetime=60)

    claims = jwt.decode(token, options={"verify_signature": False})

    assert set(claims) == {"sub", "iat", "exp", "scope"}


def test_memory_holds_no_token() -> None:
    """What is kept of a token is the digest of it."""
    proving = verifier()
    token = signed(CLAIMS)

    prove(proving, token)

    kept = repr(vars(proving._proven))
    assert token not in kept
    assert repr(hashlib.sha256(token.encode()).digest()) in kept
