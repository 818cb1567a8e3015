"""What must not travel: credentials upstream, secrets and words into logs and problems, connection fields either way.

The upstream is a stub that keeps each request as it came; the log is read after everything that can go wrong did.
"""

import contextlib
import http.client
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jwt
import pytest

from proxy.credentials import make_key
from tests.security.wire import Answer, Stub, connection, exchange, head, json_answer, stub_upstream
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

type Fields = list[tuple[str, str | bytes]]

AGENT_SECRET = secrets.token_urlsafe(48)
THREAD_SECRET = secrets.token_urlsafe(48)
PROMPT = "my-doctor-said-something"
REPLY = "the-agent-answered-in-confidence"
FAILURE = "postgres://admin:hunter2@db"
CANARIES = {"cookie": "session-of-the-browser", "query": "word-in-a-query", "header": "word-in-a-header"}

LINE = json.dumps({"event": "message", "message": REPLY}).encode() + b"\n"
ERROR_LINE = json.dumps({"event": "error", "data": {"reason": FAILURE}}).encode() + b"\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"


def chunk(data: bytes) -> bytes:
    """Write one chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


UPSTREAMS_OWN = [
    b"connection: keep-alive, x-next-hop",
    b"x-next-hop: canary",
    b"keep-alive: timeout=canary",
    b"proxy-authenticate: Basic canary",
    b"trailer: x-canary",
    b"set-cookie: canary=1",
    b"server: canary",
    b"location: http://canary.test/",
    b"access-control-allow-origin: canary",
    b"access-control-allow-credentials: canary",
    b"x-accel-redirect: /canary",
    b"x-accel-buffering: yes-canary",
    b"content-security-policy: canary",
    b"strict-transport-security: canary",
    b"x-request-id: canary",
    b"www-authenticate: canary",
    b"cache-control: canary",
    b"x-kept: yes",
]

ANSWERS: dict[bytes, bytes] = {
    b"[own-fields]": json_answer(b"{}", "200 OK", *UPSTREAMS_OWN),
    b"[good]": json_answer(json.dumps({"data": REPLY}).encode()),
    b"[stream]": STREAM_HEAD + b"\r\n" + chunk(LINE) + chunk(LINE) + b"0\r\n\r\n",
    b"[error-midway]": STREAM_HEAD + b"\r\n" + chunk(LINE) + chunk(ERROR_LINE) + b"0\r\n\r\n",
    b"[cut-midway]": STREAM_HEAD + b"connection: close\r\n\r\n" + chunk(LINE),
    b"[broken-chunk]": STREAM_HEAD + b"connection: close\r\n\r\n" + chunk(LINE) + FAILURE.encode() + b"\r\n",
    b"[failed]": json_answer(json.dumps({"error": {"message": FAILURE}}).encode(), "500 Internal Server Error"),
    b"[distrust]": json_answer(json.dumps({"error": {"message": FAILURE}}).encode(), "401 Unauthorized"),
    b"[gibberish]": FAILURE.encode() + b"\r\nconnection: close\r\n\r\n",
    b"[bad-head]": b"HTTP/1.1 200 OK\r\n" + FAILURE.encode() + b"\x00\r\nconnection: close\r\n\r\n",
    b"[unframed]": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + REPLY.encode(),
    b"[surplus]": json_answer(b"{}") + json_answer(REPLY.encode()),
    b"/v1/threads?": json_answer(REPLY.encode()),
}
"""What the upstream says, by what stands in the request."""


def respond(request: bytes) -> bytes:
    """Answer as the first word found asks."""
    return next((answer for word, answer in ANSWERS.items() if word in request), ANSWERS[b"[good]"])


@dataclass(frozen=True, slots=True)
class House:
    """A running proxy at its most talkative, the upstream behind it, and who may call."""

    proxy: Proxy
    stub: Stub
    principals: Principals
    token: str
    key: str

    def send(self, text: str, *fields: tuple[str, str | bytes], target: str = "/agent/invoke") -> Answer:
        """Invoke with `text`, as Alice."""
        body = json.dumps({"text": text}).encode()
        return self.post(body, ("Authorization", f"Bearer {self.token}"), *fields, target=target)

    def post(self, body: bytes, *fields: tuple[str, str | bytes], target: str = "/agent/invoke") -> Answer:
        """Send `body` with these fields and no others of note."""
        framing: Fields = [("Content-Length", str(len(body))), ("Content-Type", "application/json")]
        return exchange(self.proxy.url, head("POST", target, *framing, *fields) + body)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One proxy that logs everything it has to say."""
    principals = Principals()
    key = principals.key("billing")
    with stub_upstream(respond) as stub:
        proxy = start_proxy(
            tmp_path_factory.mktemp("proxy"),
            stub.url,
            AGENT_SECRET,
            **principals.environment(),
            PROXY_AGENT_AUDIENCE="agentflow",
            PROXY_THREAD_SECRET=THREAD_SECRET,
            PROXY_LOG_LEVEL="debug",
            PROXY_RATE_LIMIT="off",
            PROXY_AUTH_FAILURE_LIMIT="off",
        )
        yield House(proxy, stub, principals, principals.token("alice"), key)
        stop_proxy(proxy.process)


# What crosses to the upstream.

CLIENTS_OWN: Fields = [
    ("Cookie", CANARIES["cookie"]),
    ("Origin", "https://canary.test"),
    ("Referer", "https://canary.test/"),
    ("Forwarded", "for=canary.test"),
    ("X-Forwarded-For", "canary.test"),
    ("X-Forwarded-Host", "canary.test"),
    ("X-Forwarded-Proto", "canary.test"),
    ("X-Forwarded-User", "canary.test"),
    ("X-Real-IP", "canary.test"),
    ("X-User-Id", "canary.test"),
    ("X-Remote-User", "canary.test"),
    ("X-HTTP-Method-Override", "canary"),
    ("Proxy-Authorization", "Basic canary"),
    ("Proxy-Connection", "keep-alive"),
    ("Keep-Alive", "timeout=77"),
    ("TE", "trailers"),
    ("Trailer", "X-Canary"),
    ("Accept-Encoding", "canary"),
    ("Range", "bytes=0-1"),
    ("X-Anything", "canary"),
]


def sent_fields(request: bytes) -> list[tuple[str, str]]:
    """Read the fields of a request that the upstream received."""
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return [(line.partition(":")[0].lower(), line.partition(":")[2].strip()) for line in lines]


@pytest.mark.parametrize("kind", ["token", "key"])
def test_only_listed_fields_cross_upstream(house: House, kind: str) -> None:
    """Whatever a client sends, the sidecar sees our identity, our framing, and a handful of harmless fields."""
    credential = ("Authorization", f"Bearer {house.token}") if kind == "token" else ("X-API-Key", house.key)

    house.post(b'{"text":"[good]"}', credential, *CLIENTS_OWN, ("Accept", "application/json"), ("User-Agent", "test"))

    received = house.stub.requests[-1]
    names = [name for name, _ in sent_fields(received)]
    assert sorted(names) == [
        "accept", "authorization", "content-length", "content-type", "host", "user-agent", "x-request-id",
    ]  # fmt: skip
    assert f"http://{dict(sent_fields(received))['host']}" == house.stub.url
    assert not [word for word in ("canary", house.token, house.key, *CANARIES.values()) if word.encode() in received]


def test_what_connection_names_stays_here(house: House) -> None:
    """A field that the client declares to be for the next hop only is not passed on (RFC 9110, 7.6.1)."""
    house.send("[good]", ("Connection", "keep-alive, Accept-Language"), ("Accept-Language", "de"), ("Accept", "a/b"))

    names = [name for name, _ in sent_fields(house.stub.requests[-1])]

    assert "accept-language" not in names
    assert "connection" not in names
    assert "accept" in names


@pytest.mark.parametrize(("kind", "user_id"), [("token", "jwt:16:https://idp.test:alice"), ("key", "key:{key_id}")])
def test_identity_crosses_as_a_minutes_token(house: House, kind: str, user_id: str) -> None:
    """Signed by the proxy's own secret, for this sidecar, for at most 60 seconds, about exactly this caller."""
    credential = ("Authorization", f"Bearer {house.token}") if kind == "token" else ("X-API-Key", house.key)
    house.post(b'{"text":"[good]"}', credential)

    scheme, _, token = dict(sent_fields(house.stub.requests[-1]))["authorization"].partition(" ")
    claims = jwt.decode(token, AGENT_SECRET, algorithms=["HS256"], audience="agentflow", issuer="agentflow-proxy")

    assert scheme == "Bearer"
    assert token != house.token
    assert claims["user_id"] == user_id.format(key_id=house.key.split("_")[1])
    assert claims["exp"] - claims["iat"] <= 60
    assert claims["exp"] <= time.time() + 60
    assert set(claims) == {"user_id", "sub", "iss", "aud", "iat", "exp"}


def test_the_callers_query_does_not_cross(house: House) -> None:
    """Only parameters of the row are sent on, so neither a token nor a thread rides on a query."""
    house.send("[good]", target=f"/agent/invoke?thread_id=x&access_token={house.token}")

    request_line = house.stub.requests[-1].partition(b"\r\n")[0]

    assert request_line == b"POST /v1/graph/invoke HTTP/1.1"


# What comes back.


def test_upstreams_own_fields_stay_behind(house: House) -> None:
    """Hop-by-hop fields, those that Connection names, and whatever steers browsers or the edge reach no client."""
    answer = house.send("[own-fields]")

    assert answer.status == 200
    assert answer.values("x-kept") == ["yes"]
    assert [name for name, value in answer.fields if "canary" in value] == []
    assert answer.values("x-accel-buffering") == ["no"]
    assert len(answer.values("x-request-id")) == 1


# What is told, to the log and to whoever asked.


def refused(house: House) -> Iterator[bytes]:
    """Write requests that are refused, each with something in it that is nobody else's business."""
    good = house.token
    words = json.dumps({"text": PROMPT}).encode()
    presented: list[Fields] = [
        [("Authorization", f"Basic {good}")],
        [("Authorization", f"Bearer {good} {good}")],
        [("Authorization", f"Bearer {good[:-3]}")],
        [("Authorization", f"Bearer {good}"), ("X-API-Key", house.key)],
        [("Authorization", f"Bearer {Principals().token('alice')}")],
        [("Authorization", f"Bearer {house.principals.token('alice', exp=1)}")],
        [("Authorization", f"Bearer {house.principals.token('alice', scope='')}")],
        [("X-API-Key", house.key[:-1])],
        [("X-API-Key", FOREIGN_KEY)],
        [("X-API-Key", f"{house.key} ")],
        [("X-API-Key", f"{house.key}\t{house.key}")],
        [],
    ]
    for fields in presented:
        length = ("Content-Length", str(len(words)))
        yield head("POST", f"/agent/invoke?key={house.key}&q={CANARIES['query']}", *fields, length) + words
    signed = ("Authorization", f"Bearer {good}")
    for body in (
        PROMPT.encode(),
        json.dumps({"text": PROMPT}).encode()[:-2],
        json.dumps([PROMPT]).encode(),
        json.dumps({"text": [PROMPT]}).encode(),
        json.dumps({"text": "x", "thread_id": {"a": PROMPT}}).encode(),
        json.dumps({"text": "x", "thread_id": f"{PROMPT} {PROMPT}"}).encode(),
        json.dumps({"messages": [{"role": PROMPT, "content": PROMPT}]}).encode(),
        json.dumps({"messages": [{"role": [PROMPT]}]}).encode(),
        json.dumps({"messages": PROMPT}).encode(),
        json.dumps({"messages": [], "config": {"user_id": PROMPT}}).encode(),
        json.dumps({"messages": [], "response_granularity": PROMPT}).encode(),
        json.dumps({"messages": [], "recursion_limit": PROMPT}).encode(),
        b'{"text":"' + PROMPT.encode() + b'\xff"}',
        b'{"text":"x","resume":' + b"9" * 400 + b"e999}",
    ):
        length = ("Content-Length", str(len(body)))
        yield head("POST", "/agent/invoke", signed, length, ("X-Header", CANARIES["header"])) + body
    yield head("POST", "/agent/invoke", signed, ("Content-Length", "9"), ("Content-Type", PROMPT)) + b"{}       "
    yield head("POST", "/agent/invoke", signed, ("Content-Length", "9999999"))
    yield head("GET", f"/agent/v1/threads?limit={PROMPT}", signed)
    yield head("GET", f"/agent/v1/threads?search={PROMPT}", signed)
    yield head("GET", f"/agent/nowhere?search={PROMPT}", signed, ("Cookie", CANARIES["cookie"]))
    yield head("PUT", "/agent/invoke", signed, ("Cookie", CANARIES["cookie"]))
    yield f"{PROMPT} {good}\r\n\r\n".encode()
    yield head("GET", "/agent/ping", (f"Bad Name {good}", PROMPT))


FOREIGN_KEY = make_key(secrets.choice)


@pytest.fixture(scope="module")
def told(house: House) -> list[Answer]:
    """Send requests of all kinds, good, refused and failing, and give what was answered, as far as it was whole."""
    answers = []
    requests = list(refused(house))
    for word in ANSWERS:
        body = json.dumps({"text": f"{word.decode()} {PROMPT}", "thread_id": "support-42"}).encode()
        fields: Fields = [("Content-Length", str(len(body))), ("Cookie", CANARIES["cookie"])]
        for credential in (("Authorization", f"Bearer {house.token}"), ("X-API-Key", house.key)):
            requests += [head("POST", f"/agent/{name}", credential, *fields) + body for name in ("invoke", "stream")]
    for request in requests:
        with contextlib.suppress(http.client.HTTPException, ConnectionError):  # cut off on purpose
            answers.append(exchange(house.proxy.url, request))
    hang_up(house, head("POST", "/agent/invoke", ("Authorization", f"Bearer {house.token}"), ("Content-Length", "99")))
    wait_for_line(house.proxy, end="client_left")
    return answers


def wait_for_line(proxy: Proxy, **fields: str) -> None:
    """Wait until the log has a line with these fields: lines are written after their answers."""
    deadline = time.monotonic() + 10
    while not any(fields.items() <= line.items() for line in proxy.log_lines()):
        assert time.monotonic() < deadline, fields
        time.sleep(0.01)


def hang_up(house: House, request: bytes) -> None:
    """Send the beginning of a request, and leave."""
    with connection(house.proxy.url) as connected:
        connected.sendall(request + PROMPT.encode())


def secrets_of(house: House) -> dict[str, str]:
    """Give whatever must be in no log line, by name."""
    return {
        "token": house.token,
        "signature": house.token.rpartition(".")[2],
        "key": house.key,
        "key's secret": house.key.rpartition("_")[2][:20],
        "foreign key": FOREIGN_KEY,
        "jwt secret": house.principals.jwt_secret,
        "agent secret": AGENT_SECRET,
        "thread secret": THREAD_SECRET,
        "digest": house.principals.entries[0].partition("digest")[2].split(":")[2][:64],
        "any token": "eyJ",
        "prompt": PROMPT,
        "reply": REPLY,
        "upstream's failure": FAILURE,
        **CANARIES,
    }


def test_the_log_holds_no_secret_and_no_words(house: House, told: list[Answer]) -> None:
    """After everything that can go wrong, at the most talkative level: no credential, secret, prompt or answer."""
    log = house.proxy.log.read_text()

    assert len(told) > 40
    assert {name for name, secret in secrets_of(house).items() if secret in log} == set()


def test_every_refusal_is_in_the_log_all_the_same(house: House, told: list[Answer]) -> None:
    """Nothing is kept quiet either: each answer has its line, with the caller's name and how it ended."""
    lines = {line["request_id"]: line for line in house.proxy.log_lines() if line["event"] == "request.finished"}
    numbered = [answer for answer in told if answer.values("x-request-id")]

    assert len(numbered) > 40
    for answer in numbered:
        line = lines[answer.values("x-request-id")[0]]
        assert (line["status"], line["bytes"]) == (answer.status, len(answer.body))
    assert {line["principal"] for line in lines.values()} >= {"alice", "billing", None}
    assert {line["end"] for line in lines.values()} >= {"done", "refused", "upstream_cut", "upstream_malformed"}
    assert {line.get("code") for line in lines.values()} >= {
        "invalid_request", "credential_missing", "invalid_token", "insufficient_scope", "invalid_body",
        "upstream_cut", "upstream_malformed", "upstream_distrust",
    }  # fmt: skip


def test_a_problem_holds_no_secret_and_no_words(house: House, told: list[Answer]) -> None:
    """What we answer in our own words repeats neither a credential, nor a body, nor what the sidecar said."""
    problems = [answer for answer in told if answer.values("content-type") == ["application/problem+json"]]
    named = {name: secret for name, secret in secrets_of(house).items() if name != "query"}

    assert len(problems) > 30
    for problem in problems:
        assert {name for name, secret in named.items() if secret.encode() in problem.body} == set()


def test_an_agents_own_error_passes_as_it_is(house: House, told: list[Answer]) -> None:
    """The counterpart: an error that is the sidecar's whole answer is told to its caller, and to nobody else."""
    whole = [answer for answer in told if answer.status == 500 and FAILURE.encode() in answer.body]

    assert {answer.body for answer in whole} == {json.dumps({"error": {"message": FAILURE}}).encode()}


def test_an_error_line_keeps_the_exceptions_text_here(house: House, told: list[Answer]) -> None:
    """A stream that fails midway goes on to its end, and says that it failed, but not why."""
    streams = [house.send(word, target="/agent/stream") for word in ("[error-midway]", "[stream]")]

    assert [answer.status for answer in streams] == [200, 200]
    assert streams[0].body.startswith(LINE + b'{"event":"error"')
    assert all(FAILURE.encode() not in answer.body for answer in streams)


def test_a_stopped_proxy_has_logged_lines_only(tmp_path: Path) -> None:
    """From start to end each line is one JSON object, and the end is a clean one: nothing is left open."""
    principals = Principals()
    with stub_upstream(respond) as stub:
        proxy = start_proxy(tmp_path, stub.url, AGENT_SECRET, **principals.environment())
        exchange(proxy.url, head("GET", "/agent/ping", ("Authorization", f"Bearer {principals.token('alice')}")))
        stop_proxy(proxy.process)

    lines = proxy.log.read_text().splitlines()

    assert [line for line in lines if not line.startswith("{")] == []
    assert proxy.process.returncode == 0
