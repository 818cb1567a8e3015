"""How much a caller may ask for, at a running proxy: what is refused, what is told, and who is not concerned.

Windows are days where a test counts, so that no window turns while it does; the sixty of a minute are counted
within one minute, anew if it turned.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.credentials import make_key
from tests.security.wire import Answer, Stub, exchange, head, json_answer, stub_upstream
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

type Fields = list[tuple[str, str | bytes]]

SECRET = "the secret of the agent behind, 32+"
DAY = 86_400
LIMIT = re.compile(r'"requests";r=(\d+);t=(\d+)')


class Caller:
    """Somebody with a proxy to call, and the stub behind it to look at."""

    def __init__(self, proxy: Proxy, stub: Stub, principals: Principals, key: str) -> None:
        self.proxy = proxy
        self.stub = stub
        self.principals = principals
        self.key = key

    def call(self, subject: str, body: bytes = b'{"text":"hi"}') -> Answer:
        """Invoke as `subject`."""
        return self.send(f"Bearer {self.principals.token(subject)}", body)

    def send(self, authorization: str, body: bytes = b'{"text":"hi"}', *fields: tuple[str, str]) -> Answer:
        """Invoke with this Authorization."""
        framing: Fields = [("Content-Length", str(len(body))), ("Content-Type", "application/json")]
        request = head("POST", "/agent/invoke", ("Authorization", authorization), *framing, *fields)
        return exchange(self.proxy.url, request + body)

    def get(self, path: str, *fields: tuple[str, str]) -> Answer:
        """Get a path."""
        return exchange(self.proxy.url, head("GET", path, *fields))

    def ping(self, address: str, *fields: tuple[str, str]) -> Answer:
        """Ping from an address, as the edge in front would tell it."""
        return self.get("/agent/ping", ("X-Forwarded-For", address), *fields)


@contextmanager
def house(directory: Path, **environment: str) -> Iterator[Caller]:
    """Run a proxy with these settings before an upstream that answers everything."""
    principals = Principals()
    key = principals.key("billing")
    with stub_upstream(lambda _: json_answer(b"{}")) as stub:
        proxy = start_proxy(directory, stub.url, SECRET, **principals.environment(), **environment)
        try:
            yield Caller(proxy, stub, principals, key)
        finally:
            stop_proxy(proxy.process)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Run a proxy whose limits nobody set."""
    with house(tmp_path_factory.mktemp("default")) as caller:
        yield caller


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Run a proxy behind one trusted hop, with three requests and three failures a day."""
    settings = {"PROXY_RATE_LIMIT": "3/day", "PROXY_AUTH_FAILURE_LIMIT": "3/day", "PROXY_TRUSTED_HOPS": "1"}
    with house(tmp_path_factory.mktemp("daily"), **settings) as caller:
        yield caller


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Run a proxy with two windows at once, that tells older clients too."""
    settings = {"PROXY_RATE_LIMIT": "2/hour;3/day", "PROXY_LEGACY_RATE_HEADERS": "true"}
    with house(tmp_path_factory.mktemp("several"), **settings) as caller:
        yield caller


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Run a proxy whose limits are off."""
    settings = {"PROXY_RATE_LIMIT": "off", "PROXY_AUTH_FAILURE_LIMIT": "off"}
    with house(tmp_path_factory.mktemp("unlimited"), **settings) as caller:
        yield caller


def standing(answer: Answer) -> tuple[int, int]:
    """Read what remains and when there is more, from an answer with one policy."""
    (told,) = answer.values("ratelimit")
    match = LIMIT.fullmatch(told)
    assert match is not None, told
    return int(match[1]), int(match[2])


def within_one_window[Counted](seconds: int, count: Callable[[int], Counted]) -> Counted:
    """Count until a count began and ended in one window; each attempt gets its number."""
    for attempt in range(5):
        window = time.time() // seconds
        counted = count(attempt)
        if time.time() // seconds == window:
            return counted
    pytest.fail("five windows turned")


def test_sixty_a_minute_are_admitted(default: Caller) -> None:
    """By default: the sixtieth is answered, the sixty-first is not, and each answer counts down."""
    answers = within_one_window(60, lambda attempt: [default.call(f"eager-{attempt}") for _ in range(61)])

    assert [answer.status for answer in answers] == [200] * 60 + [429]
    assert [standing(answer)[0] for answer in answers] == [*reversed(range(60)), 0]
    assert {policy for answer in answers for policy in answer.values("ratelimit-policy")} == {'"requests";q=60;w=60'}
    assert all(1 <= standing(answer)[1] <= 120 for answer in answers)


def test_a_refusal_says_when_to_come_back(daily: Caller) -> None:
    """429 is an RFC 9457 problem of the registered type, with Retry-After no earlier than the limit's own `t`."""
    before = len(daily.stub.requests)
    answers = [daily.call("told") for _ in range(4)]

    refusal = answers[-1]
    remaining, reset = standing(refusal)
    (retry,) = refusal.values("retry-after")
    problem = refusal.problem()
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert len(daily.stub.requests) == before + 3
    assert (remaining, refusal.values("ratelimit-policy")) == (0, ['"requests";q=3;w=86400'])
    assert re.fullmatch(r"[1-9]\d*", retry)
    assert reset <= int(retry) <= 2 * DAY
    assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert (problem["status"], problem["code"]) == (429, "rate_exceeded")
    assert problem["violated-policies"] == ["requests"]
    assert [problem["request_id"]] == refusal.values("x-request-id")
    assert all(answer.values("retry-after") == [] for answer in answers[:3])


@pytest.mark.parametrize("announced", [("Content-Length", "1000"), ("Transfer-Encoding", "chunked")])
def test_a_refusal_does_not_wait_for_the_body(daily: Caller, announced: tuple[str, str]) -> None:
    """Whose quota is spent has no body read, and is not asked to send one."""
    subject = f"bodiless-{announced[0]}"
    for _ in range(3):
        daily.call(subject)
    token = ("Authorization", f"Bearer {daily.principals.token(subject)}")

    answer = exchange(daily.proxy.url, head("POST", "/agent/invoke", token, announced, ("Expect", "100-continue")))

    assert answer.status == 429


def test_each_caller_has_a_quota_of_its_own(daily: Caller) -> None:
    """One caller's spending is not another's, a key's not a person's, wherever they call from."""
    spent = [daily.call("spender").status for _ in range(4)]

    other = daily.call("saver")
    key = daily.get("/agent/ping", ("X-API-Key", daily.key))

    assert spent[-1] == 429
    assert [(answer.status, standing(answer)[0]) for answer in (other, key)] == [(200, 2), (200, 2)]


def test_a_caller_has_one_quota_for_all_tokens_and_operations(daily: Caller) -> None:
    """Signing in again or calling something else buys nothing."""
    daily.call("hopper")
    daily.send(f"Bearer {daily.principals.token('hopper', jti='2')}")
    third = daily.get("/agent/ping", ("Authorization", f"Bearer {daily.principals.token('hopper', jti='3')}"))

    fourth = daily.get("/agent/v1/threads", ("Authorization", f"Bearer {daily.principals.token('hopper', jti='4')}"))

    assert (third.status, fourth.status) == (200, 429)


def test_every_answer_of_a_limited_operation_tells_the_limit(daily: Caller) -> None:
    """200, 422 and 429 alike; and what was charged is what is told."""
    answers = [daily.call("various"), daily.call("various", b'{"text":7}'), daily.call("various", b"no json")]
    answers.append(daily.call("various"))

    assert [answer.status for answer in answers] == [200, 422, 400, 429]
    assert [standing(answer)[0] for answer in answers] == [2, 1, 0, 0]
    assert {len(answer.values("ratelimit-policy")) for answer in answers} == {1}


def test_a_refused_request_is_not_charged(daily: Caller) -> None:
    """Neither a missing scope nor a path that leads nowhere costs anything."""
    narrow = daily.principals.token("frugal", scopes=[])
    wide = daily.principals.token("frugal")
    refusals = [
        daily.get("/agent/ping", ("Authorization", f"Bearer {narrow}")),
        daily.get("/agent/nowhere", ("Authorization", f"Bearer {wide}")),
    ]

    answer = daily.call("frugal")

    assert [refusal.status for refusal in refusals] == [403, 404]
    assert standing(answer)[0] == 2


def test_health_is_never_limited(daily: Caller) -> None:
    """Probes are answered however often they ask, and no limit's fields are told."""
    answers = [daily.get(path, ("X-Forwarded-For", "192.0.2.99")) for path in ("/health/live", "/health/ready") * 10]

    assert {answer.status for answer in answers} == {200}
    assert not [answer for answer in answers if answer.values("ratelimit") or answer.values("ratelimit-policy")]


def test_several_windows_hold_at_once(several: Caller) -> None:
    """Each is told, and the one that is spent is named."""
    answers = within_one_window(3600, lambda attempt: [several.call(f"twofold-{attempt}") for _ in range(3)])

    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[0].values("ratelimit-policy") == ['"requests-3600s";q=2;w=3600, "requests-86400s";q=3;w=86400']
    (told,) = answers[-1].values("ratelimit")
    assert re.fullmatch(r'"requests-3600s";r=0;t=\d+, "requests-86400s";r=1;t=\d+', told)
    assert answers[-1].problem()["violated-policies"] == ["requests-3600s"]


def test_older_clients_are_told_when_a_setting_says_so(several: Caller, daily: Caller) -> None:
    """X-RateLimit fields come beside the standard ones, and by default not at all."""
    old, new = several.call("old"), daily.call("new")

    (reset,) = old.values("x-ratelimit-reset")
    assert (old.values("x-ratelimit-limit"), old.values("x-ratelimit-remaining")) == (["2"], ["1"])
    assert int(reset) > time.time() - 60
    assert not [name for name, _ in new.fields if name.lower().startswith("x-ratelimit")]


def test_off_is_off(unlimited: Caller) -> None:
    """No limit, no fields about one; and failures do not add up either."""
    answers = [unlimited.call("anybody") for _ in range(70)]
    failures = [unlimited.send("Bearer void") for _ in range(30)]

    assert ({answer.status for answer in answers}, {failure.status for failure in failures}) == ({200}, {401})
    assert not [answer for answer in answers if answer.values("ratelimit") or answer.values("ratelimit-policy")]


# Failed credentials, by address.

VOID = ("Authorization", "Bearer void")


def test_failed_credentials_are_limited_by_address(daily: Caller) -> None:
    """Three wrong ones, of whatever kind, and the address is told to come back; another address is not concerned."""
    kinds = [VOID, ("X-API-Key", make_key(lambda letters: letters[1])), ("Authorization", "Basic YTpi"), VOID]

    answers = [daily.ping("192.0.2.1", kind) for kind in kinds]
    elsewhere = daily.ping("192.0.2.2", VOID)

    assert [answer.status for answer in answers] == [401, 401, 400, 429]
    assert answers[-1].values("ratelimit-policy") == ['"failures";q=3;w=86400']
    assert answers[-1].problem()["violated-policies"] == ["failures"]
    assert int(answers[-1].values("retry-after")[0]) >= 1
    assert elsewhere.status == 401


def test_who_guesses_further_left_is_still_himself(daily: Caller) -> None:
    """Only the entry that the trusted hop wrote counts: what a client puts before it changes nothing."""
    answers = [daily.ping(f"203.0.113.{number}, 192.0.2.3", VOID) for number in range(4)]
    split = daily.get("/agent/ping", VOID, ("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-For", "192.0.2.3"))

    assert [answer.status for answer in (*answers, split)] == [401, 401, 401, 429, 429]


def test_an_ipv6_subscriber_is_one_address(daily: Caller) -> None:
    """A /64 is one subscriber's, so moving about in it does not help; the next one is somebody else."""
    answers = [daily.ping(f"2001:db8:0:1::{number}", VOID) for number in range(1, 5)]
    mapped = [
        daily.ping(address, VOID) for address in ("::ffff:192.0.2.4", "192.0.2.4", "::ffff:c000:204", "192.0.2.4")
    ]

    assert [answer.status for answer in answers] == [401, 401, 401, 429]
    assert [answer.status for answer in mapped] == [401, 401, 401, 429]
    assert daily.ping("2001:db8:0:2::1", VOID).status == 401


def test_failures_cost_the_known_callers_of_an_address_nothing(daily: Caller) -> None:
    """Whoever shares an address with a guesser keeps working: a stored key, and a token proven before."""
    token = ("Authorization", f"Bearer {daily.principals.token('neighbour')}")
    proven = daily.ping("192.0.2.5", token)
    failures = [daily.ping("192.0.2.5", VOID) for _ in range(4)]

    known = daily.ping("192.0.2.5", token)
    unproven = daily.ping("192.0.2.5", ("Authorization", f"Bearer {daily.principals.token('newcomer')}"))

    assert failures[-1].status == 429
    assert (proven.status, known.status) == (200, 200)
    assert unproven.status == 429


def test_no_credential_is_no_failure(daily: Caller) -> None:
    """A browser or a probe without one is told how to sign in, every time."""
    answers = [daily.ping("192.0.2.6") for _ in range(5)]

    assert [answer.status for answer in answers] == [401] * 5


def test_without_a_trusted_hop_the_peer_counts(tmp_path: Path) -> None:
    """Nobody's X-Forwarded-For is believed unless a setting says who writes it; twenty a minute are forgiven."""
    with house(tmp_path) as caller:
        answers = within_one_window(60, lambda _: [caller.ping(f"198.51.100.{number}", VOID) for number in range(21)])

    assert answers[-1].status == 429
    assert answers[-1].values("ratelimit-policy") == ['"failures";q=20;w=60']
