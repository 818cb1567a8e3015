"""Tokens that were forged, or are merely odd: each is refused, whatever kind of key its issuer has.

Every table has its honest counterpart, so that nothing is refused because everything is.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.claims import ClaimRules
from proxy.errors import CredentialInvalid
from proxy.issuers import Issuer, shared_secret_issuer
from proxy.jose import UnprovenToken, read_token
from proxy.model import Principal
from proxy.publickeys import PUBLIC, KnownKeys, Signatures, VerificationKey, pem_keys, set_keys, shared_key
from proxy.tokens import TokenVerifier
from tests.support.jose import Signer, b64, compact, hmac_signed, make_signer

NOW: Final = 1_800_000_000
SECRET: Final = b"a-shared-secret-of-more-than-32-bytes"
SHARED: Final = "https://shared.test"
KEYED: Final = "https://keyed.test"
AUDIENCE: Final = "agentflow-proxy"
RSA: Final = make_signer("RS256")
PSS: Final = Signer("PS256", RSA.key, "k1")
EC: Final = make_signer("ES256", "k2")
ED: Final = make_signer("EdDSA", "k3")
EVIL: Final = make_signer("RS256")
"""The forger's own key, under the provider's key id."""
GOOD: Final[Mapping[str, Any]] = {"iss": KEYED, "aud": AUDIENCE, "sub": "alice", "iat": NOW, "exp": NOW + 600}
GOOD_SHARED: Final[Mapping[str, Any]] = dict(GOOD) | {"iss": SHARED}
HS: Final = {"alg": "HS256", "typ": "JWT"}
LONG: Final = "9" * 5000


def verifier(algorithms: frozenset[str] = PUBLIC) -> TokenVerifier:
    """Make a verifier of one issuer with a secret and one with every kind of public key, of which RSA's has no alg."""
    shared = shared_secret_issuer([SECRET.decode()], rules(SHARED))
    keys = set_keys({"keys": [RSA.jwk(alg=None), EC.jwk(), ED.jwk()]}, algorithms)
    keyed = Issuer(rules=rules(KEYED), algorithms=algorithms, keys=keys)
    return TokenVerifier([(issuer, KnownKeys(issuer.keys)) for issuer in (shared, keyed)], lambda: NOW)


def rules(issuer: str, **more: Any) -> ClaimRules:
    """Give the rules of both issuers."""
    return ClaimRules(issuer=issuer, audience=AUDIENCE, leeway=10, max_lifetime=86_400, **more)


def prove(token: str, by: TokenVerifier | None = None) -> Principal:
    """Prove a token whose keys are known, which never waits."""
    with pytest.raises(StopIteration) as ended:
        (by or verifier()).prove(token).send(None)
    principal: Principal = ended.value.value
    return principal


def hs(header: object = HS, payload: object = GOOD_SHARED) -> str:
    """Sign with the true secret."""
    return hmac_signed(header, payload, SECRET)


def rs(payload: object = GOOD, **header: object) -> str:
    """Sign with the true key."""
    return RSA.sign(payload, **header)


def changed(**claims: object) -> dict[str, object]:
    """Give claims with some of them replaced; the type Ellipsis takes one away."""
    return {name: value for name, value in (dict(GOOD) | claims).items() if value is not ...}


@pytest.mark.parametrize("signer", [RSA, PSS, EC, ED], ids=lambda signer: signer.algorithm)
def test_an_honest_token_is_proven(signer: Signer) -> None:
    """Each algorithm, with and without a key id and a type, proves its subject."""
    by = verifier(PUBLIC - {"RS256"} if signer is PSS else PUBLIC)
    for header in ({}, {"kid": None}, {"typ": None}, {"typ": "at+jwt"}, {"typ": "application/at+jwt"}, {"x5t": "abc"}):
        assert prove(signer.sign(GOOD, **header), by).namespace == f"jwt:18:{KEYED}:alice"


def test_an_honest_shared_token_is_proven() -> None:
    """The same of a shared secret, whatever key id it names: ids choose among keys that have one."""
    for token in (hs(), hs({"alg": "HS256"}), hs({"alg": "HS256", "kid": "../../etc/passwd"})):
        assert prove(token).namespace == f"jwt:19:{SHARED}:alice"


@pytest.mark.parametrize(
    "payload",
    [
        changed(aud=[AUDIENCE, "other"]),
        changed(exp=NOW + 0.5),
        changed(exp=NOW - 9, iat=NOW - 60),
        changed(iat=...),
        changed(nbf=NOW + 10),
        changed(iat=NOW + 10),
        changed(jti="x"),
        changed(sub="Ålice B."),
        changed(scope=""),
        changed(extra={"deep": [1, None, "ü"]}),
        json.dumps(GOOD, indent=2).encode(),
    ],
    ids=repr,
)
def test_what_is_rare_but_right_is_proven(payload: object) -> None:
    """Strictness costs no honest issuer anything."""
    assert prove(rs(payload)).kind == "jwt"


NONE = [
    "none", "None", "NONE", "nOnE", "noNe", "none ", " none", "none\x00", "", "null", "nonE", "NoNe", "n\u043ene", "NULL",
]  # fmt: skip
ALGORITHMS = [
    "HS384", "HS512", "hs256", "Hs256", "HS256 ", "RS384", "RS512", "rs256", "PS384", "PS512", "ES384", "ES512",
    "ES256K", "eddsa", "EDDSA", "Ed25519", "Ed448", "RS1", "RSA-OAEP", "dir", "A128KW", "ECDH-ES", "HS1", "HS256/64",
    "../HS256", "SHA256", 0, 256, None, True, [], ["HS256"], {}, {"HS256": 1}, ["none"], -1, 1.5,
]  # fmt: skip


def confused() -> dict[str, str]:
    """Sign with the provider's public key, in every form it is known in, as if it were a shared secret."""
    pkcs1 = RSA.key.public_key().public_bytes(Encoding.PEM, PublicFormat.PKCS1)
    numbers = RSA.jwk()
    forms = {
        "PEM": RSA.pem(),
        "PEM without its last line break": RSA.pem().strip(),
        "PEM with CRLF": RSA.pem().replace(b"\n", b"\r\n"),
        "PEM of PKCS 1": pkcs1,
        "DER": RSA.der(),
        "PEM body": b"".join(RSA.pem().splitlines()[1:-1]),
        "JWK": json.dumps(numbers).encode(),
        "JWK, compact": json.dumps(numbers, separators=(",", ":")).encode(),
        "JWK, sorted": json.dumps(numbers, sort_keys=True).encode(),
        "modulus": numbers["n"].encode(),
        "key set": json.dumps({"keys": [numbers]}).encode(),
        "EC PEM": EC.pem(),
        "Ed25519 PEM": ED.pem(),
        "Ed25519 raw": ED.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw),
        "nothing": b"",
        "one null": b"\x00",
    }
    return {
        f"{algorithm} under the {form} of {issuer}": hmac_signed(
            {"alg": algorithm, "kid": "k1"}, dict(GOOD) | {"iss": issuer}, key, digest
        )
        for form, key in forms.items()
        for algorithm, digest in (("HS256", "sha256"), ("HS512", "sha512"), ("RS256", "sha256"))
        for issuer in (KEYED, SHARED)
    }


def injected() -> dict[str, str]:
    """Name a key of the forger's own, by an id or by bringing it along."""
    ids = [
        "../../../../dev/null", "/dev/null", "/proc/self/environ", "k1\x00", "k1' OR '1'='1", "'; DROP TABLE keys; --",
        "k1' UNION SELECT 'x", "$(id)", "|id", "k1\r\nX-Admin: 1", "https://evil.test/k", "*", "", " ", "k1 ", "K1", "k" * 256,
        0, 1, True, None, [], ["k1"], {"k1": 1}, 1.5, "\u202ek1", "k\u0131",
    ]  # fmt: skip
    own = EVIL.jwk(kid="evil")
    brought = {
        "jwk": own, "jku": "https://evil.test/jwks", "x5u": "https://evil.test/x5u", "x5c": [b64(EVIL.der())],
    }  # fmt: skip
    tokens = {f"kid {key_id!r}": EVIL.sign_as({"alg": "RS256", "kid": key_id}, GOOD) for key_id in ids}
    tokens |= {f"true key, kid {key_id!r}": RSA.sign_as({"alg": "RS256", "kid": key_id}, GOOD) for key_id in ids}
    for name, value in brought.items():
        tokens[f"{name} of the forger's"] = EVIL.sign_as({"alg": "RS256", "kid": "evil", name: value}, GOOD)
        tokens[f"{name} under the true id"] = EVIL.sign_as({"alg": "RS256", "kid": "k1", name: value}, GOOD)
        tokens[f"{name} though the key is true"] = rs(**{name: value})
        tokens[f"{name} of a shared secret"] = hs(HS | {name: value})
    return tokens


def extended() -> dict[str, str]:
    """Ask for another way of reading."""
    headers: dict[str, dict[str, object]] = {
        "crit, unknown": {"crit": ["http://x"], "http://x": 1},
        "crit of exp": {"crit": ["exp"], "exp": 1},
        "crit, empty": {"crit": []},
        "crit, text": {"crit": "b64"},
        "crit, null": {"crit": None},
        "crit of alg": {"crit": ["alg"]},
        "crit of b64": {"crit": ["b64"], "b64": True},
        "b64 false": {"b64": False},
        "b64 false in crit": {"b64": False, "crit": ["b64"]},
        "b64 true": {"b64": True},
        "zip": {"zip": "DEF"},
        "zip, null": {"zip": None},
        "nested": {"cty": "JWT"},
        "enc": {"enc": "A128GCM"},
        "typ of another kind": {"typ": "dpop+jwt"},
        "typ JOSE": {"typ": "JOSE"},
        "typ, empty": {"typ": ""},
        "typ, a number": {"typ": 1},
        "typ, a list": {"typ": ["JWT"]},
        "typ, a security event": {"typ": "secevent+jwt"},
        "typ, a logout": {"typ": "logout+jwt"},
    }
    tokens = {
        f"{name}, by key": RSA.sign_as({"alg": "RS256", "kid": "k1"} | more, GOOD) for name, more in headers.items()
    }
    return tokens | {f"{name}, by secret": hs(HS | more) for name, more in headers.items()}


def spelled() -> dict[str, str]:
    """Write a true token in another way than the one."""
    token = rs()
    header, payload, signature = token.split(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    short = ED.sign(GOOD)
    bits = last[last.index(short[-1]) ^ 1]
    return {
        "nothing": "",
        "a dot": ".",
        "two dots": "..",
        "three dots": "...",
        "two parts": f"{header}.{payload}",
        "no signature": f"{header}.{payload}.",
        "no payload": f"{header}..{signature}",
        "no header": f".{payload}.{signature}",
        "four parts": f"{token}.x",
        "four parts, the last empty": f"{token}.",
        "five parts": f"{b64(b'{"alg":"dir","enc":"A128GCM"}')}..{b64(b'i' * 12)}.{b64(b'c')}.{b64(b't' * 16)}",
        "a JWS in JSON": json.dumps({"protected": header, "payload": payload, "signature": signature}),
        "a JWS in general JSON": json.dumps({"payload": payload, "signatures": [{"protected": header}]}),
        "padded header": f"{header}=.{payload}.{signature}",
        "padded payload": f"{header}.{payload}==.{signature}",
        "padded signature": f"{token}==",
        "space before": f" {token}",
        "space after": f"{token} ",
        "line break after": f"{token}\n",
        "space inside": f"{header}. {payload}.{signature}",
        "tab inside": f"{header}.{payload}\t.{signature}",
        "null after": f"{token}\x00",
        "plus for minus": f"{header}.{payload}.{'+' + signature[1:]}",
        "slash for underscore": f"{header}.{payload}.{'/' + signature[1:]}",
        "trailing bits set": short[:-1] + bits,
        "one letter more": f"{token}A",
        "one letter less": token[:-1],
        "signature twice": f"{token}{signature}",
        "signature of zeros": f"{header}.{payload}.{b64(bytes(256))}",
        "signature of an EC point at infinity": compact({"alg": "ES256", "kid": "k2"}, GOOD, bytes(64)),
        "EC signature in DER": compact({"alg": "ES256", "kid": "k2"}, GOOD, bytes.fromhex("3006020101020101")),
        "Ed25519 signature of zeros": compact({"alg": "EdDSA", "kid": "k3"}, GOOD, bytes(64)),
        "oversized": RSA.sign(changed(pad="x" * 8192)),
        "oversized header": RSA.sign(GOOD, pad="x" * 8192),
        "another's payload": f"{header}.{b64(json.dumps(changed(sub='bob')).encode())}.{signature}",
        "upper case": token.upper(),
        "with its scheme": f"Bearer {token}",
        "quoted": f'"{token}"',
        "full-width dot": token.replace(".", "\uff0e"),
    }


def unreadable() -> dict[str, str]:
    """Sign bytes that are not one JSON object, with one meaning, in UTF-8."""
    text = json.dumps(GOOD)
    texts: dict[str, bytes] = {
        "UTF-16": text.encode("utf-16"),
        "UTF-16 little-endian": text.encode("utf-16-le"),
        "UTF-32": text.encode("utf-32"),
        "a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "not UTF-8": text.encode().replace(b"alice", b"al\xff"),
        "an overlong letter": text.encode().replace(b"alice", b"\xc1\xa1lice"),
        "a lone surrogate": text.replace("alice", "\\ud800").encode(),
        "a lone surrogate in what nobody reads": text.replace("{", '{"x": "\\udfff", ', 1).encode(),
        "a list": b"[]",
        "a text": b'"alice"',
        "a number": b"1",
        "null": b"null",
        "two objects": text.encode() + b"{}",
        "a comment": text.encode() + b"/**/",
        "single quotes": text.replace('"', "'").encode(),
        "a trailing comma": text.replace("}", ",}").encode(),
        "cut": text.encode()[:-1],
        "too deep": b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
        "a null byte": text.encode() + b"\x00",
    }
    for name, value in (("sub", '"bob"'), ("exp", str(NOW + 600)), ("iss", f'"{KEYED}"'), ("scope", '"agent:invoke"')):
        texts[f"{name} twice"] = text.replace("{", f'{{"{name}": {value}, "{name}": {value}, ', 1).encode()
        texts[f"{name} twice, escaped"] = text.replace(
            "{", f'{{"{name}": {value}, "\\u{ord(name[0]):04x}{name[1:]}": {value}, ', 1
        ).encode()
    texts["a name twice, deep inside"] = text.replace("{", '{"x": [{"a": 1, "a": 2}], ', 1).encode()
    for number in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        LONG,
        "0x7fffffff",
        "1_800_000_600",
        "+1800000600",
        "01800000600",
    ):
        texts[f"exp {number[:12]}"] = text.replace(f'"exp": {NOW + 600}', f'"exp": {number}').encode()
    tokens = {f"payload: {name}": RSA.sign(raw) for name, raw in texts.items()}
    header = '{"alg":"RS256","kid":"k1"}'
    headers: dict[str, bytes] = {
        "alg twice": b'{"alg":"none","alg":"RS256","kid":"k1"}',
        "kid twice": b'{"alg":"RS256","kid":"evil","kid":"k1"}',
        "UTF-16": header.encode("utf-16"),
        "a list": b"[]",
        "nothing": b"{}",
        "a byte order mark": b"\xef\xbb\xbf" + header.encode(),
    }
    return tokens | {f"header: {name}": RSA.sign_as(raw, GOOD) for name, raw in headers.items()}


def misclaimed() -> dict[str, str]:
    """Sign claims that are wrong, missing, of another kind, or of no sense."""
    wrong: dict[str, list[object]] = {
        "iss": [..., "", KEYED + "/", KEYED.upper(), "https://evil.test", SHARED, None, 1, [KEYED], {KEYED: 1}, KEYED + "\n"],
        "aud": [..., "", "other", AUDIENCE + " ", AUDIENCE.upper(), [], [[AUDIENCE]], ["other"], {AUDIENCE: 1}, None, 1,
                [AUDIENCE, 1], [AUDIENCE, None], [AUDIENCE, ""], True],
        "sub": [..., "", None, 0, 7, True, ["alice"], {"alice": 1}, "a\nb", "a\x00", "\u202ealice", "\u200balice", "a\x7f",
                "a" * 256, "\ufeffalice", "a\u2028b", 1.5],
        "exp": [..., None, "", "never", str(NOW + 600), True, [NOW + 600], {}, NOW - 11, NOW - 10, 0, -1, -NOW, 1e300, 1e18,
                10**30, 253_402_300_800, NOW + 86_401 + 600, NOW * 1000, float(NOW) - 60],
        "iat": [None, "", str(NOW), True, [NOW], {}, -1, NOW + 11, NOW * 1000, 1e300, NOW + 3600, NOW - 86_400],
        "nbf": [None, "", str(NOW), False, [NOW], {}, -1, NOW + 11, NOW * 1000, 1e300, NOW + 3600],
        "scope": [None, 7, True, {"agent:invoke": 1}, ["agent:invoke", 7], [["agent:invoke"]], 1.5],
        "jti": [None, 7, "", [], {}, "x" * 256],
        "tier": [None, 7, "", "a b", ["gold"], "gold\n", "../gold", "x" * 65],
    }  # fmt: skip
    return {
        f"{name} {repr(value)[:40]}": RSA.sign(changed(**{name: value}))
        for name, values in wrong.items()
        for value in values
    }


def crossed() -> dict[str, str]:
    """Let one issuer, or one kind of key, speak for another."""
    weak = Signer("RS256", rsa.generate_private_key(65537, 1024), "k1")  # noqa: S505  weak is the point
    curve = Signer("ES256", ec.generate_private_key(ec.SECP256K1()), "k2")
    return {
        "the secret's issuer claims to be the other": hs(payload=GOOD),
        "the key's issuer claims to be the other": rs(GOOD_SHARED),
        "PS256 said, RS256 signed": RSA.sign_as({"alg": "PS256", "kid": "k1"}, GOOD),
        "RS256 said, PS256 signed": PSS.sign_as({"alg": "RS256", "kid": "k1"}, GOOD),
        "ES256 said, RSA signed": RSA.sign_as({"alg": "ES256", "kid": "k1"}, GOOD),
        "RS256 said, EC key named": EC.sign_as({"alg": "RS256", "kid": "k2"}, GOOD),
        "EdDSA said, EC signed": EC.sign_as({"alg": "EdDSA", "kid": "k2"}, GOOD),
        "HS256 said, RSA signed": RSA.sign_as({"alg": "HS256", "kid": "k1"}, GOOD_SHARED),
        "the forger's key": EVIL.sign(GOOD),
        "a weak key of the forger's": weak.sign(GOOD),
        "another curve": curve.sign_as({"alg": "ES256", "kid": "k2"}, GOOD),
        "a key of another id": RSA.sign_as({"alg": "RS256", "kid": "k2"}, GOOD),
        "a secret that is nearly ours": hmac_signed(HS, GOOD_SHARED, SECRET + b"\n"),
        "no secret": hmac_signed(HS, GOOD_SHARED, b""),
        "a nested token": RSA.sign(rs().encode()),
    }


def unsigned() -> dict[str, str]:
    """Say that nothing was signed, or that it was by something else."""
    tokens = {f"alg {alg!r}, unsigned": compact({"alg": alg}, GOOD) for alg in NONE}
    tokens |= {f"alg {alg!r}, signed": RSA.sign_as({"alg": alg, "kid": "k1"}, GOOD) for alg in NONE}
    tokens |= {f"alg {alg!r}, by secret": hs({"alg": alg}) for alg in [*NONE, *ALGORITHMS]}
    tokens |= {f"alg {alg!r}, by key": RSA.sign_as({"alg": alg, "kid": "k1"}, GOOD) for alg in ALGORITHMS}
    return tokens | {"no alg": RSA.sign_as({"kid": "k1"}, GOOD), "no header": RSA.sign_as({}, GOOD)}


FORGED: Final = unsigned() | confused() | injected() | extended() | spelled() | unreadable() | misclaimed() | crossed()


def test_the_table_is_large_enough() -> None:
    """At least 150, no two of them the same."""
    assert len(set(FORGED.values())) >= 150


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_token_is_refused(name: str) -> None:
    """It proves nothing, is not remembered, and fails in no other way than that."""
    proving = verifier()

    with pytest.raises(CredentialInvalid):
        prove(FORGED[name], proving)

    assert not proving._proven._values


ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_change_to_a_true_token_is_refused(choices: st.DataObject) -> None:
    """One letter put in, left out or exchanged anywhere proves nothing: a proven token has one spelling."""
    token = choices.draw(st.sampled_from([rs(), hs(), ED.sign(GOOD), EC.sign(GOOD)]))
    at = choices.draw(st.integers(0, len(token) - 1))
    letter = choices.draw(st.sampled_from([*ALPHABET, "=", "+", "/", " ", "\n", "é", ""]))
    kept = choices.draw(st.sampled_from([at, at + 1]))
    other = token[:at] + letter + token[kept:]

    if other != token:
        with pytest.raises(CredentialInvalid):
            prove(other)


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "x5c", "zip", "cty"]), JSON),
    st.dictionaries(st.sampled_from(["iss", "aud", "sub", "exp", "iat", "nbf", "jti", "scope", "tier"]), JSON),
)
def test_anything_signed_proves_its_own_subject_or_nothing(header: dict[str, Any], payload: dict[str, Any]) -> None:
    """Whatever its issuer truly signed is a principal with a printable name and a time, or refused."""
    told = dict(GOOD_SHARED) | payload
    try:
        principal = prove(hs(HS | header, told))
    except CredentialInvalid:
        return

    assert principal.subject == told["sub"]
    assert principal.subject.isprintable()
    assert told["iss"] == SHARED
    assert NOW - 10 < told["exp"] <= NOW + 86_400 + 10


@given(st.binary(max_size=200))
def test_any_bytes_prove_nothing(raw: bytes) -> None:
    """Neither as a token, nor as a part of one that is otherwise well formed."""
    for token in (raw.decode("latin-1"), compact(raw, GOOD, b"x"), compact(HS, raw, raw), b64(raw)):
        with pytest.raises(CredentialInvalid):
            prove(token)


# What the RFCs' own authors signed, with the keys that they published.

PAYLOAD_7515: Final = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
PAYLOAD_7520: Final = (
    "SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c2luZXNzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUgcm9h"
    "ZCwgYW5kIGlmIHlvdSBkb24ndCBrZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0IGJlIHN3"
    "ZXB0IG9mZiB0by4"
)
HS_7515: Final = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
HS_7520: Final = "hJtXIZ2uSN5kbQfbtTNWbpdmhkV8FJG-Onbc6mxCcYg"
RSA_7515: Final = {
    "kty": "RSA",
    "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-S"
    "Fd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTB"
    "EMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2P"
    "AcDTW9gb54h4FRWyuXpoQ",
    "e": "AQAB",
}
RSA_7520: Final = {
    "kty": "RSA",
    "kid": "bilbo.baggins@hobbiton.example",
    "use": "sig",
    "n": "n4EPtAOCc9AlkeQHPzHStgAbgs7bTZLwUBZdR8_KuKPEHLd4rHVTeT-O-XV2jRojdNhxJWTDvNd7nqQ0VEiZQHz_AJmSCpMaJMRBSFK"
    "rKb2wqVwGU_NsYOYL-QtiWN2lbzcEe6XC0dApr5ydQLrHqkHHig3RBordaZ6Aj-oBHqFEHYpPe7Tpe-OfVfHd1E6cS6M1FZcD1NNLYD5lFHpP"
    "I9bTwJlsde3uhGqC0ZCuEHg8lhzwOHrtIQbS0FVbb9k3-tVTU4fg_3L_vniUFAKwuCLqKnS2BYwdq_mzSnbLY7h_qixoR7jig3__kRhuaxwUk"
    "Rz5iaiQkqgc5gHdrNP5zw",
    "e": "AQAB",
}
EC_7515: Final = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}
ED_8037: Final = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
EXAMPLES: Final[dict[str, tuple[str, str, str, str, object]]] = {
    "RFC 7515 A.1": (
        "HS256",
        "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9",
        PAYLOAD_7515,
        "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
        HS_7515,
    ),
    "RFC 7515 A.2": (
        "RS256",
        "eyJhbGciOiJSUzI1NiJ9",
        PAYLOAD_7515,
        (
            "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdb"
            "F9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383"
            "LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWy"
            "wlVmtVrBp0igcN_IoypGlUPQGe77Rw"
        ),
        RSA_7515,
    ),
    "RFC 7515 A.3": (
        "ES256",
        "eyJhbGciOiJFUzI1NiJ9",
        PAYLOAD_7515,
        "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
        EC_7515,
    ),
    "RFC 7520 4.1": (
        "RS256",
        "eyJhbGciOiJSUzI1NiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9",
        PAYLOAD_7520,
        (
            "MRjdkly7_-oTPTS3AXP41iQIGKa80A0ZmTuV5MEaHoxnW2e5CZ5NlKtainoFmKZopdHM1O2U4mwzJdQx996ivp83xuglII7PNDi84wnB-"
            "BDkoBwA78185hX-Es4JIwmDLJK3lfWRa-XtL0RnltuYv746iYTh_qHRD68BNt1uSNCrUCTJDt5aAE6x8wW1Kt9eRo4QPocSadnHXFxnt8"
            "Is9UzpERV0ePPQdLuW3IS_de3xyIrDaLGdjluPxUAhb6L2aXic1U12podGU0KLUQSE_oI-ZnmKJ3F4uOZDnd6QZWJushZ41Axf_fcIe8u"
            "9ipH84ogoree7vjbU5y18kDquDg"
        ),
        RSA_7520,
    ),
    "RFC 7520 4.4": (
        "HS256",
        "eyJhbGciOiJIUzI1NiIsImtpZCI6IjAxOGMwYWU1LTRkOWItNDcxYi1iZmQ2LWVlZjMxNGJjNzAzNyJ9",
        PAYLOAD_7520,
        "s0h6KThzkfBBBkLspW1h84VsJZFTsPPqMDA7g1Md7p0",
        HS_7520,
    ),
    "RFC 8037 A.4": (
        "EdDSA",
        "eyJhbGciOiJFZERTQSJ9",
        "RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc",
        "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg",
        ED_8037,
    ),
}


def keys_of(key: object) -> tuple[VerificationKey, ...]:
    """Read a published key, shared or public, as the proxy reads its own."""
    return (VerificationKey("HS256", unb64(key)),) if isinstance(key, str) else set_keys({"keys": [key]}, PUBLIC)


def unb64(text: str) -> bytes:
    """Read base64url."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_rfcs_verify(name: str) -> None:
    """Each signature holds with its key, and with no other's; one bit more or less in what is signed, and it does not."""
    algorithm, header, payload, signature, key = EXAMPLES[name]
    signatures = Signatures()
    signed = f"{header}.{payload}".encode()
    true = UnprovenToken(algorithm, None, "", {}, signed, unb64(signature))
    false = UnprovenToken(algorithm, None, "", {}, signed + b"A", unb64(signature))

    assert signatures.prove(true, keys_of(key))
    assert not signatures.prove(false, keys_of(key))
    others = [other for *_, other in EXAMPLES.values() if other != key]
    assert not any(signatures.prove(true, keys_of(other)) for other in others)


@pytest.mark.parametrize("name", ["RFC 7515 A.1", "RFC 7515 A.2", "RFC 7515 A.3"])
def test_the_rfcs_own_tokens_are_read(name: str) -> None:
    """Their form is right, line breaks within the JSON and all; what they lack is a subject."""
    _, header, payload, signature, _ = EXAMPLES[name]

    read = read_token(f"{header}.{payload}.{signature}")

    assert read.claims == {"iss": "joe", "exp": 1_300_819_380, "http://example.com/is_root": True}


@pytest.mark.parametrize(
    "key",
    [
        RSA.jwk(use="enc"),
        RSA.jwk(use=1),
        RSA.jwk(use=None, key_ops=["encrypt"]),
        RSA.jwk(key_ops=[]),
        RSA.jwk(key_ops="verify"),
        RSA.jwk(key_ops=["sign"]),
        RSA.jwk(alg="RSA-OAEP"),
        RSA.jwk(alg="HS256"),
        RSA.jwk(alg=7),
        RSA.jwk(kid=7),
        RSA.jwk(kty="rsa"),
        RSA.jwk(kty=None),
        RSA.jwk(kty=["RSA"]),
        RSA.jwk(n=None),
        RSA.jwk(n=7),
        RSA.jwk(n="!"),
        RSA.jwk(e="AQ"),
        RSA.jwk(e="Aw"),
        RSA.jwk(d="AQAB"),
        make_signer("RS256", bits=1024).jwk(),
        EC.jwk(crv="P-384"),
        EC.jwk(crv="secp256k1"),
        EC.jwk(x=b64(bytes(32))),
        EC.jwk(y=b64(bytes(32))),
        EC.jwk(x="AA"),
        EC.jwk(alg="ES512"),
        ED.jwk(crv="Ed448"),
        ED.jwk(crv="X25519"),
        ED.jwk(x="AA"),
        {"kty": "oct", "k": b64(SECRET), "kid": "k1"},
        {"kty": "oct", "k": b64(SECRET), "kid": "k1", "alg": "RS256"},
        {},
        [],
        None,
        "key",
    ],
    ids=lambda _: "key",
)
def test_a_key_that_is_not_for_this_is_passed_over(key: object) -> None:
    """Weak, private, shared, broken, or meant for something else: it is no key here, and its neighbours still are."""
    with pytest.raises(ValueError, match="no usable key"):
        set_keys({"keys": [key]}, PUBLIC)

    assert len(set_keys({"keys": [key, ED.jwk()]}, PUBLIC)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        RSA.pem().decode().replace("PUBLIC KEY", "CERTIFICATE"),
        RSA.pem().decode().replace("MII", "MMM"),
        make_signer("RS256", bits=1024).pem().decode(),
        ec.generate_private_key(ec.SECP384R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        .decode(),
        RSA.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        RSA.pem().decode() + RSA.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
    ],
    ids=lambda _: "text",
)
def test_a_pem_text_holds_strong_public_keys_only(text: str) -> None:
    """Anything else stops the start."""
    with pytest.raises(ValueError, match="holds"):
        pem_keys(text, PUBLIC)


def test_a_public_key_is_no_secret() -> None:
    """An operator who gives a public key for a shared secret would let everybody sign."""
    with pytest.raises(ValueError, match="not a key in PEM or JWK form"):
        shared_key(RSA.pem().decode())


@pytest.mark.parametrize("pinned", ["RS256", "PS256", "ES256", "EdDSA"])
def test_only_the_pinned_algorithm_counts(pinned: str) -> None:
    """One key set, one algorithm pinned: what another key of the set signed is refused."""
    proving = verifier(frozenset({pinned}))

    for signer in (RSA, PSS, EC, ED):
        if signer.algorithm == pinned:
            assert prove(signer.sign(GOOD), proving).subject == "alice"
        else:
            with pytest.raises(CredentialInvalid):
                prove(signer.sign(GOOD), proving)


RS_AND_PS: Final = frozenset({"RS256", "PS256"})


@pytest.mark.parametrize(
    ("algorithms", "own", "used"),
    [
        (PUBLIC, None, "RS256"),
        (RS_AND_PS, None, "RS256"),
        (RS_AND_PS, "RS256", "RS256"),
        (RS_AND_PS, "PS256", "PS256"),
        (PUBLIC - {"RS256"}, None, "PS256"),
        (PUBLIC - {"RS256"}, "PS256", "PS256"),
        (PUBLIC - {"PS256"}, None, "RS256"),
    ],
)
def test_each_key_is_used_with_exactly_one_algorithm(algorithms: frozenset[str], own: str | None, used: str) -> None:
    """An RSA key proves signatures of one kind: its own `alg`'s, or the one that the issuer's setting leaves.

    As a JSON Web Key and, where it cannot say its own, as PEM (RFC 8725 §3.1).
    """
    keys = [set_keys({"keys": [RSA.jwk(alg=own)]}, algorithms)]
    if own is None:
        keys.append(pem_keys(RSA.pem().decode(), algorithms))

    for known in keys:
        issuer = Issuer(rules=rules(KEYED), algorithms=algorithms, keys=known)
        proving = TokenVerifier([(issuer, KnownKeys(known))], lambda: NOW)
        for signer in (RSA, PSS):
            if signer.algorithm == used:
                assert prove(signer.sign(GOOD), proving).subject == "alice"
            else:
                with pytest.raises(CredentialInvalid):
                    prove(signer.sign(GOOD), proving)
        assert [key.algorithm for key in known] == [used]
