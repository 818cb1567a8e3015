"""Every way to be refused, at every operation, through a running proxy: the answer, and that nobody behind hears of it.

Requests are written onto the socket as bytes, since clients tidy up exactly what an attacker would not.
"""

import base64
import itertools
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jwt
import pytest

from proxy.credentials import make_key
from proxy.operations import NOT_EXPOSED, NOT_EXPOSED_PREFIXES, OPERATIONS, SCOPES, Kind, Operation
from tests.security.wire import Answer, Stub, exchange, head, json_answer, stub_upstream
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

type Fields = list[tuple[str, str | bytes]]

NONE = ['Bearer realm="agent"', 'ApiKey realm="agent"']
INVALID = ['Bearer realm="agent", error="invalid_token"', 'ApiKey realm="agent"']
MALFORMED = ['Bearer realm="agent", error="invalid_request"']
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
AGENT_SECRET = "the secret of the agent behind, 32+"  # gitleaks:allow
NOW = int(time.time())

ROWS = pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: f"{row.method} {row.path}")


@dataclass(frozen=True, slots=True)
class House:
    """A running proxy, the upstream that must not be reached, and who may call."""

    proxy: Proxy
    stub: Stub
    principals: Principals
    key: str
    narrow_keys: dict[str, str]
    """By scope, a key that has every scope but this one."""

    def refused(self, request: bytes) -> Answer:
        """Send a request, and see that nothing of it reaches upstream."""
        before = len(self.stub.requests)
        answer = exchange(self.proxy.url, request)
        assert len(self.stub.requests) == before
        return answer

    def token(self, **claims: object) -> str:
        """Sign a token with every scope; `claims` are added or replaced, None takes one away."""
        usual = jwt.decode(self.principals.token("alice"), options={"verify_signature": False})
        meant = {name: value for name, value in (usual | claims).items() if value is not None}
        return jwt.encode(meant, self.principals.jwt_secret, "HS256")

    def foreign(self) -> str:
        """Sign the same with a secret that is not this deployment's."""
        return Principals().token("alice")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One proxy before an upstream that answers everything; no limits, so that each refusal is its own."""
    principals = Principals()
    key = principals.key("billing")
    narrow = {scope: principals.key(f"not-{scope.replace(':', '-')}", SCOPES - {scope}) for scope in SCOPES}
    listing = json_answer(b'{"data":{"threads":[],"file_id":"f-1"},"metadata":{}}')
    with stub_upstream(lambda _: listing) as stub:
        proxy = start_proxy(
            tmp_path_factory.mktemp("proxy"),
            stub.url,
            AGENT_SECRET,
            **principals.environment(),
            PROXY_RATE_LIMIT="off",
            PROXY_AUTH_FAILURE_LIMIT="off",
        )
        yield House(proxy, stub, principals, key, narrow)
        stop_proxy(proxy.process)


def path_of(row: Operation) -> str:
    """Fill a row's path."""
    return row.path.format(thread_id="support-42", message_id="m-1", file_id="f-1")


def written(row: Operation, fields: Fields, target: str | None = None, method: str | None = None) -> bytes:
    """Write a request for `row` whose announced body never comes."""
    body: Fields = [("Content-Type", "application/json"), ("Content-Length", "512")] if row.method == "POST" else []
    return head(method or row.method, target or path_of(row), *fields, *body)


def bearer(token: str) -> Fields:
    """Present a token."""
    return [("Authorization", f"Bearer {token}")]


def challenged(answer: Answer, status: int, code: str, challenge: list[str], path: str) -> None:
    """Hold a refusal against the conventions, all of it."""
    problem = answer.problem()
    request_id = answer.values("x-request-id")
    assert (answer.status, answer.values("www-authenticate")) == (status, challenge)
    assert [problem["request_id"]] == request_id
    assert problem["instance"] == path
    assert (problem["type"], problem["status"], problem["code"]) == ("about:blank", status, code)
    assert problem["title"]
    assert answer.values("cache-control") == ["no-store"]


# No credential.

ABSENT: dict[str, Fields] = {
    "nothing": [],
    "cookie": [("Cookie", "access_token=abc; Authorization=Bearer abc")],
    "proxy authorization": [("Proxy-Authorization", "Bearer abc")],
    "underscores": [("X_API_KEY", "abc")],
    "another name": [("X-Api-Token", "abc"), ("Api-Key", "abc")],
    "identity headers": [("X-Forwarded-User", "alice"), ("X-Remote-User", "alice"), ("X-User-Id", "alice")],
    "overridden method": [("X-HTTP-Method-Override", "GET"), ("X-Original-URL", "/health/live")],
}


HANDSHAKE: Fields = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
    ("Sec-WebSocket-Protocol", "agentflow-bearer, abc"),
]


@ROWS
def test_a_handshake_is_no_credential(house: House, row: Operation) -> None:
    """A WebSocket's handshake needs a credential like any request, and with a body behind it is no request at all."""
    answer = house.refused(written(row, HANDSHAKE[:-1] if row.kind is Kind.DUPLEX else HANDSHAKE))

    if row.method == "POST":
        assert answer.status == 400
    else:
        challenged(answer, 401, "credential_missing", NONE, path_of(row))


@ROWS
@pytest.mark.parametrize("absent", ABSENT)
def test_no_credential_is_told_how_to_present_one(house: House, row: Operation, absent: str) -> None:
    """Both schemes are offered, without an error code, and nothing else stands for a credential."""
    answer = house.refused(written(row, ABSENT[absent]))

    challenged(answer, 401, "credential_missing", NONE, path_of(row))


@ROWS
def test_a_credential_in_the_query_counts_for_nothing(house: House, row: Operation) -> None:
    """URLs end up in logs, so RFC 6750's query parameter is not read."""
    target = f"{path_of(row)}?access_token={house.token()}&api_key={house.key}"

    answer = house.refused(written(row, [], target))

    challenged(answer, 401, "credential_missing", NONE, path_of(row))


# A credential that cannot be read, and more than one.

UNREADABLE: dict[str, Fields] = {
    "empty": [("Authorization", "")],
    "scheme alone": [("Authorization", "Bearer")],
    "scheme and space": [("Authorization", "Bearer ")],
    "basic": [("Authorization", "Basic YWxpY2U6cw==")],
    "api key scheme": [("Authorization", "ApiKey abc")],
    "no scheme": [("Authorization", "eyJhbGciOiJIUzI1NiJ9.e30.x")],
    "two spaces": [("Authorization", "Bearer  abc")],
    "tab": [("Authorization", "Bearer\tabc")],
    "inner space": [("Authorization", "Bearer abc def")],
    "list of two": [("Authorization", "Bearer abc, Bearer def")],
    "not ascii": [("Authorization", "Bearer ab\u00e9".encode())],
    "latin": [("Authorization", b"Bearer ab\xe9")],
    "oversized": [("Authorization", "Bearer " + "a" * 8193)],
    "empty key": [("X-API-Key", "")],
    "key with space": [("X-API-Key", "afp_a b")],
    "key not ascii": [("X-API-Key", "afp_\u00e9".encode())],
    "oversized key": [("X-API-Key", "a" * 8193)],
}


@ROWS
@pytest.mark.parametrize("unreadable", UNREADABLE)
def test_a_malformed_credential_is_a_bad_request(house: House, row: Operation, unreadable: str) -> None:
    """What cannot be read is told apart from what proves nothing (RFC 6750, 3.1)."""
    answer = house.refused(written(row, UNREADABLE[unreadable]))

    challenged(answer, 400, "invalid_request", MALFORMED, path_of(row))


@ROWS
def test_two_credentials_are_a_bad_request(house: House, row: Operation) -> None:
    """Two kinds, the same twice, either order, either of them void: exactly one, exactly once."""
    token, key = bearer(house.token()), [("X-API-Key", house.key)]
    pairs: list[Fields] = [
        token + key,
        key + token,
        token + token,
        key + key,
        [*token, ("authorization", f"Bearer {house.token(sub='bob')}")],
        [*key, ("x-api-KEY", make_key(secrets.choice))],
        [*token, ("X-API-Key", "")],
        [*token, ("X-API-Key", "void")],
        [*key, ("Authorization", "Bearer void")],
        [*key, ("Authorization", "Basic YWxpY2U6cw==")],
    ]

    answers = [house.refused(written(row, pair)) for pair in pairs]

    for answer in answers:
        challenged(answer, 400, "invalid_request", MALFORMED, path_of(row))


# A credential that proves nothing.


def unsigned(claims: dict[str, object]) -> str:
    """Write a token that says it needs no signature."""
    parts = [json.dumps(part).encode() for part in ({"alg": "none", "typ": "JWT"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts) + "."


def with_head(house: House, secret: str, algorithm: str = "HS256", **header: object) -> str:
    """Sign the claims of a good token under another head, secret or algorithm."""
    claims = jwt.decode(house.token(), options={"verify_signature": False})
    return jwt.encode(claims, secret, algorithm, headers=header)


def other_secret_same_id(key: str) -> str:
    """Make a well-formed key with the id of `key`, its checksum right."""
    wanted = iter(key.split("_")[1])
    letters = itertools.chain(wanted, (secrets.choice("abc") for _ in itertools.count()))
    return make_key(lambda _: next(letters))


def worthless(house: House) -> dict[str, Fields]:
    """Give readable credentials that prove nothing, by what is wrong with them."""
    good, secret = house.token(), house.principals.jwt_secret
    first, second, third = good.split(".")
    other = house.token(sub="bob").split(".")
    last = house.key[-1]
    tokens = {
        "no token": "abc",
        "expired": house.token(exp=NOW - 3600, iat=NOW - 7200),
        "expired beyond the leeway": house.token(exp=NOW - 30),
        "not yet valid": house.token(nbf=NOW + 3600),
        "issued in the future": house.token(iat=NOW + 3600),
        "foreign secret": house.foreign(),
        "foreign issuer": house.token(iss="https://other.test"),
        "issuer in another case": house.token(iss=house.principals.issuer.upper()),
        "foreign audience": house.token(aud="another-service"),
        "foreign audiences": house.token(aud=["another-service", "agentflow"]),
        "signed by the internal secret": with_head(house, AGENT_SECRET),
        "no expiry": house.token(exp=None),
        "no subject": house.token(sub=None),
        "no issuer": house.token(iss=None),
        "no audience": house.token(aud=None),
        "expiry as a word": house.token(exp="never"),
        "subject empty": house.token(sub=""),
        "subject too long": house.token(sub="a" * 256),
        "subject with a line break": house.token(sub="alice\nbob"),
        "subject with an escape": house.token(sub="alice\u202e"),
        "scopes as a number": house.token(scope=7),
        "no algorithm": unsigned(jwt.decode(good, options={"verify_signature": False})),
        "another algorithm": with_head(house, secret * 2, "HS512"),
        "another of the same secret": with_head(house, secret, "HS384"),
        "unknown crit": with_head(house, secret, crit=["exp"]),
        "key of its own": with_head(house, "a secret of the attacker's, 32 long", jwk={"kty": "oct", "k": "AA"}),
        "key from elsewhere": with_head(house, "a secret of the attacker's, 32 long", jku="https://evil.test/jwks"),
        "another's claims": f"{first}.{other[1]}.{third}",
        "no signature": f"{first}.{second}.",
        "signature cut": good[:-4],
        "fourth part": f"{good}.{third}",
        "a key as a token": house.key,
    }
    keys = {
        "unknown key": make_key(secrets.choice),
        "another secret": other_secret_same_id(house.key),
        "a typing error": house.key[:-1] + ("a" if last != "a" else "b"),
        "cut": house.key[:-1],
        "in another case": house.key.swapcase(),
        "prefix alone": "afp_",
        "no key": "abc",
        "a token as a key": good,
        "with quotes": f'"{house.key}"',
        "a list": f"{house.key},{house.key}",
    }
    presented = {name: bearer(token) for name, token in tokens.items()}
    return presented | {f"key: {name}": [("X-API-Key", key)] for name, key in keys.items()}


@ROWS
def test_an_invalid_credential_is_refused_alike_for_every_reason(house: House, row: Operation) -> None:
    """Expired, foreign, forged, unknown: status, challenge and body are the same, so nothing can be learnt of why."""
    answers = {name: house.refused(written(row, fields)) for name, fields in worthless(house).items()}

    bodies = set()
    for name, answer in answers.items():
        assert answer.status == 401, name
        challenged(answer, 401, "invalid_token", INVALID, path_of(row))
        bodies.add(answer.body.replace(answer.values("x-request-id")[0].encode(), b""))
    assert len(bodies) == 1


# A credential that proves a caller who may not.


def too_narrow(house: House, scope: str) -> dict[str, Fields]:
    """Give good credentials without `scope`."""
    others = SCOPES - {scope}
    scopes = {
        "every other": " ".join(others),
        "none": "",
        "in another case": scope.upper(),
        "a pattern": "agent:* threads:* *",
        "a prefix": scope[:-1],
        "longer": f"{scope}s",
        "quoted": f'"{scope}"',
        "a list in one text": f"{scope},{scope}",
    }
    tokens = {name: bearer(house.token(scope=text)) for name, text in scopes.items()}
    tokens["a list"] = bearer(house.token(scope=None, scopes=sorted(others)))
    tokens["absent"] = bearer(house.token(scope=None))
    tokens["both, the standard one counts"] = bearer(house.token(scope="", scopes=[scope]))
    return tokens | {"key": [("X-API-Key", house.narrow_keys[scope])]}


@ROWS
def test_a_missing_scope_is_named(house: House, row: Operation) -> None:
    """Every other right together is not this one."""
    answers = {name: house.refused(written(row, fields)) for name, fields in too_narrow(house, row.scope).items()}

    challenge = f'Bearer realm="agent", error="insufficient_scope", scope="{row.scope}"'
    for answer in answers.values():
        challenged(answer, 403, "insufficient_scope", [challenge], path_of(row))


# Other ways to write a path.


def aliases(path: str) -> dict[str, str]:
    """Give other spellings of a path, by what was done to it; a lenient server would take each for the path itself."""
    front, _, last = path.rpartition("/")
    return {
        "double slash": f"/{path}",
        "double slash inside": path.replace("/agent/", "/agent//", 1),
        "coded slash": path.replace("/agent/", "/agent%2F", 1),
        "coded slash, small": f"{front}%2f{last}",
        "slash coded twice": f"{front}%252F{last}",
        "trailing slash": f"{path}/",
        "trailing slashes": f"{path}//",
        "trailing coded slash": f"{path}%2F",
        "trailing dot": f"{path}/.",
        "upper case": path.upper(),
        "capital": path.replace("/agent", "/Agent", 1),
        "dot": path.replace("/agent/", "/agent/./", 1),
        "dots": path.replace("/agent/", "/agent/x/../", 1),
        "dots before": f"/health/live/..{path}",
        "coded dots": path.replace("/agent/", "/agent/x/%2e%2E/", 1),
        "coded dot": path.replace("/agent/", "/agent/%2e/", 1),
        "parameters": f"{path};x=1",
        "parameters inside": path.replace("/agent/", "/agent;x=1/", 1),
        "backslash": path.replace("/agent/", "/agent\\", 1),
        "coded backslash": path.replace("/agent/", "/agent%5C", 1),
        "null": f"{path}%00",
        "line break": f"{path}%0A",
        "overlong slash": path.replace("/agent/", "/agent%c0%af", 1),
        "prefixed": f"/v1{path}",
        "unprefixed": path.removeprefix("/agent"),
    }


def nowhere(row: Operation, spelling: str) -> tuple[int, ...]:
    """Say how it is told that a spelling leads nowhere: `upload;x=1` may be a file's name, which nobody can POST to."""
    return (405,) if (row.name, spelling) == ("files.upload", "parameters") else (404,)


SAME = {
    "absolute": "http://proxy.test{}",
    "absolute elsewhere": "http://127.0.0.1:9{}",
    "absolute with a user": "http://alice:secret@proxy.test{}",
    "query": "{}?x=1",
    "empty query": "{}?",
    "fragment": "{}#x",
    "query with a public path": "{}?/health/live",
}
"""Spellings that mean the path itself (RFC 9112, 3.2.2)."""


@ROWS
@pytest.mark.parametrize("spelling", [*aliases("/agent/x"), *SAME, "coded letter"])
def test_no_spelling_of_a_path_is_open(house: House, row: Operation, spelling: str) -> None:
    """However a path is written, the door comes first: no credential, none that is valid, and not enough of one."""
    path = path_of(row)
    spellings = aliases(path) | {name: form.format(path) for name, form in SAME.items()}
    target = (spellings | {"coded letter": path.replace("/agent", "/%61gent", 1)})[spelling]

    absent = house.refused(written(row, [], target))
    invalid = house.refused(written(row, bearer(house.foreign()), target))
    narrow = house.refused(written(row, bearer(house.token(scope="")), target))

    assert (absent.status, absent.values("www-authenticate")) == (401, NONE)
    assert (invalid.status, invalid.values("www-authenticate")) == (401, INVALID)
    assert narrow.status in (403, *nowhere(row, spelling))
    assert {answer.problem()["status"] for answer in (absent, invalid, narrow)} == {401, narrow.status}


@ROWS
@pytest.mark.parametrize("spelling", aliases("/agent/x"))
def test_another_spelling_leads_nowhere(house: House, row: Operation, spelling: str) -> None:
    """Even the owner of every right gets 404: no redirect, no guess at what was meant."""
    target = aliases(path_of(row))[spelling]

    answer = house.refused(written(row, bearer(house.token()), target))

    assert answer.status in nowhere(row, spelling)
    assert answer.values("location") == []


@pytest.mark.parametrize("public", ["/health/live", "/health/ready", "/docs", "/openapi.json"])
@pytest.mark.parametrize(
    "spelling", ["/{}", "{}/", "{}%20", "{};x", "{}/x", "{}/../agent/ping", "{}%2f..%2fagent/ping"]
)
def test_a_public_path_lends_its_openness_to_no_other(house: House, public: str, spelling: str) -> None:
    """The four open paths are open as written, and whatever only begins or decodes like them is not."""
    answer = house.refused(head("GET", spelling.format(public)))

    assert (answer.status, answer.values("www-authenticate")) == (401, NONE)


# Other methods, and what is not on the list.


@ROWS
@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_open(house: House, row: Operation, method: str) -> None:
    """OPTIONS, HEAD and the rest need a credential like any other: there is no preflight to be had."""
    preflight: Fields = [("Origin", "https://evil.test"), ("Access-Control-Request-Method", row.method)]

    answer = house.refused(written(row, preflight, method=method))

    assert (answer.status, answer.values("www-authenticate")) == (401, NONE)
    assert not [name for name, _ in answer.fields if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("path", sorted({row.path for row in OPERATIONS}))
def test_a_method_without_a_row_is_not_allowed(house: House, path: str) -> None:
    """405 tells every method that the path has (RFC 9110, 15.5.6)."""
    allowed = {row.method for row in OPERATIONS if row.path == path}
    target = path.format(thread_id="support-42", message_id="m-1", file_id="f-1")

    answers = [
        house.refused(head(method, target, *bearer(house.token()))) for method in METHODS if method not in allowed
    ]

    assert {answer.status for answer in answers} == {405}
    assert {frozenset(", ".join(answer.values("allow")).split(", ")) for answer in answers} == {frozenset(allowed)}


@pytest.mark.parametrize(
    "route", [*NOT_EXPOSED, *((m, p) for p in NOT_EXPOSED_PREFIXES for m in ("GET", "POST"))], ids=" ".join
)
def test_what_is_not_exposed_does_not_exist(house: House, route: tuple[str, str]) -> None:
    """The sidecar's other routes are 404 or 405 for whoever has every right, with and without the prefix."""
    method, upstream = route
    path = upstream.format(thread_id="support-42", message_id="m-1", file_id="f-1")

    answers = [house.refused(head(method, prefix + path, *bearer(house.token()))) for prefix in ("/agent", "")]

    assert {answer.status for answer in answers} <= {404, 405}
    assert answers[1].status == 404


# The body is not waited for.


@pytest.mark.parametrize("row", [row for row in OPERATIONS if row.method == "POST"], ids=lambda row: row.path)
@pytest.mark.parametrize(
    "announced", [("Content-Length", "1000000"), ("Transfer-Encoding", "chunked"), ("Content-Length", "99999999999")]
)
def test_a_refusal_does_not_wait_for_the_body(house: House, row: Operation, announced: tuple[str, str]) -> None:
    """Who is not admitted has nothing read of him, nor is he asked to go on (RFC 9110, 10.1.1)."""
    fields: Fields = [announced, ("Expect", "100-continue"), ("Content-Type", "application/json")]

    answers = [
        house.refused(head("POST", row.path, *presented, *fields))
        for presented in ([], UNREADABLE["basic"], bearer(house.foreign()), bearer(house.token(scope="")))
    ]

    assert [answer.status for answer in answers] == [401, 400, 401, 403]


@pytest.mark.parametrize(
    "request_head",
    [
        head("POST", "/agent/invoke", ("Content-Length", "5"), ("Transfer-Encoding", "chunked")),
        head("POST", "/agent/invoke", ("Content-Length", "5"), ("Content-Length", "6")),
        head("POST", "/agent/invoke", ("Transfer-Encoding", "identity, chunked, x")),
        b"GET /agent/ping HTTP/1.1\r\nHost: proxy.test\r\n Folded: yes\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 32,
    ],
    ids=["both framings", "two lengths", "odd coding", "folded", "tls"],
)
def test_what_is_no_request_reaches_nobody(house: House, request_head: bytes) -> None:
    """A request whose end two servers could see differently is refused whoever sends it, a rightful caller included."""
    signed = request_head.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer " + house.token().encode() + b"\r\n\r\n", 1)

    answers = [house.refused(request) for request in (request_head, signed)]

    assert [answer.status // 100 for answer in answers] == [4, 4]


# And the matrix means something: the same requests with a good credential arrive.


FORM = "multipart/form-data; boundary=b"
BODIES = {
    "stop": (b'{"thread_id":"support-42"}', "application/json"),
    "ag-ui": (b'{"threadId":"support-42"}', "application/json"),
    "files.upload": (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhi\r\n--b--\r\n', FORM),
}


def uploaded(house: House, presented: Fields) -> str:
    """Upload a file, and give its handle, which is this caller's alone."""
    body, media = BODIES["files.upload"]
    fields: Fields = [*presented, ("Content-Length", str(len(body))), ("Content-Type", media)]
    answer = exchange(house.proxy.url, head("POST", "/agent/v1/files/upload", *fields) + body)
    handle: str = json.loads(answer.body)["data"]["file_id"]
    return handle


@ROWS
@pytest.mark.parametrize("kind", ["token", "key", "absolute", "scheme in capitals"])
def test_the_rightful_caller_gets_through(house: House, row: Operation, kind: str) -> None:
    """One credential with the one scope of the row is all it takes, and each such request reaches upstream once."""
    presented: dict[str, Fields] = {
        "token": bearer(house.token(scope=row.scope)),
        "key": [("x-api-key", house.key)],
        "absolute": bearer(house.token(scope=None, scopes=[row.scope])),
        "scheme in capitals": [("authorization", f"BEARER {house.token()}")],
    }
    path = path_of(row)
    if "{file_id}" in row.path:
        everything: Fields = [("x-api-key", house.key)] if kind == "key" else bearer(house.token())
        path = path.replace("f-1", uploaded(house, everything))
    target = f"http://proxy.test{path}" if kind == "absolute" else path
    body, media = BODIES.get(row.name, (b'{"text":"hi"}', "application/json"))
    framing: Fields = [("Content-Length", str(len(body))), ("Content-Type", media)]
    before = len(house.stub.requests)

    offered = HANDSHAKE[:-1] if row.kind is Kind.DUPLEX and kind != "absolute" else []
    sent = head(row.method, target, *presented[kind], *offered, *(framing if row.method == "POST" else []))
    answer = exchange(house.proxy.url, sent + (body if row.method == "POST" else b""))

    if row.kind is Kind.DUPLEX:  # the upstream here is none, which only whoever got to it hears; others are told to ask
        assert (answer.status, len(house.stub.requests) - before) == ((502, 1) if offered else (426, 0))
        return
    assert answer.status == 200
    assert len(house.stub.requests) == before + 1
