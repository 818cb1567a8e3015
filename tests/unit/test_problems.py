"""Problems as callers are told of them: RFC 9457 bodies, and the challenges of RFC 6750 and 9110."""

import json
import re

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors, outages
from proxy.errors import (
    BodyTimeout,
    BodyTooLarge,
    CredentialInvalid,
    CredentialMissing,
    Fault,
    MalformedCredential,
    MethodNotAllowed,
    Problem,
    RateExceeded,
    ScopeMissing,
)
from proxy.model import Headers
from proxy.openapi import describe
from proxy.outages import Draining, PoolExhausted

MADE: dict[type[Problem], Problem] = {
    ScopeMissing: ScopeMissing("agent:invoke"),
    MethodNotAllowed: MethodNotAllowed("GET, DELETE"),
    BodyTooLarge: BodyTooLarge(1024),
    RateExceeded: RateExceeded(policies=("a", "b"), retry_after=18, fields=[(b"ratelimit", b'"a";r=0;t=18')]),
}


def family(kind: type[Problem] = Problem) -> list[type[Problem]]:
    """Give every kind of problem there is."""
    return [kind, *(each for below in kind.__subclasses__() for each in family(below))]


KINDS = pytest.mark.parametrize("kind", family(), ids=lambda kind: kind.__name__)


def made(kind: type[Problem]) -> Problem:
    """Make one of a kind."""
    return MADE[kind] if kind in MADE else kind("Because.", reason="s3cret")


def told(problem: Problem) -> dict[str, object]:
    """Read the body as a caller would."""
    return json.loads(problem.body(instance="/agent/invoke", request_id="id-1"))


@KINDS
def test_a_body_is_a_problem(kind: type[Problem]) -> None:
    """Every problem's body has the members of RFC 9457 and our two, as the OpenAPI page promises."""
    problem = made(kind)

    body = told(problem)

    jsonschema.validate(body, describe()["components"]["schemas"]["Problem"])
    expected = {
        "type": problem.type,
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "instance": "/agent/invoke",
        "code": problem.code,
        "request_id": "id-1",
    }
    assert body == expected | problem.members()


@KINDS
def test_the_reason_is_for_the_log_alone(kind: type[Problem]) -> None:
    """What we know of the cause is in no body, no header and no message."""
    problem = made(kind)

    shown = f"{told(problem)} {problem.headers()} {problem}"

    assert "s3cret" not in shown


@KINDS
def test_a_problem_knows_whose_fault_it_is(kind: type[Problem]) -> None:
    """A client's fault is a 4xx, ours and upstream's a 5xx; upstream's says so in its code."""
    assert 400 <= kind.status <= 599
    assert (kind.fault is Fault.CLIENT) == (kind.status < 500)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.code)
    assert kind.title
    assert kind.__doc__


def test_a_code_has_one_meaning() -> None:
    """Codes are stable names: two kinds share one only as the malformed request does."""
    kinds = [kind for kind in family() if kind is not MalformedCredential]

    codes = [kind.code for kind in kinds]

    assert len(codes) == len(set(codes))
    assert MalformedCredential.code == "invalid_request"


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("Problem", 500, "internal_error"),
        ("ClientProblem", 400, "invalid_request"),
        ("MalformedCredential", 400, "invalid_request"),
        ("CredentialMissing", 401, "credential_missing"),
        ("CredentialInvalid", 401, "invalid_token"),
        ("ScopeMissing", 403, "insufficient_scope"),
        ("NotFound", 404, "not_found"),
        ("MethodNotAllowed", 405, "method_not_allowed"),
        ("BodyTimeout", 408, "body_timeout"),
        ("BodyTooLarge", 413, "body_too_large"),
        ("BodyUnsupported", 415, "unsupported_media_type"),
        ("BodyInvalid", 422, "invalid_body"),
        ("RateExceeded", 429, "rate_exceeded"),
        ("ClientLeft", 499, "client_left"),
        ("UpstreamProblem", 502, "upstream_unreachable"),
        ("UpstreamCut", 502, "upstream_cut"),
        ("UpstreamMalformed", 502, "upstream_malformed"),
        ("UpstreamDistrust", 502, "upstream_distrust"),
        ("Draining", 503, "draining"),
        ("PoolExhausted", 503, "overloaded"),
        ("ReducedCapacity", 503, "reduced_capacity"),
        ("KeyStoreDown", 503, "key_store_down"),
        ("UpstreamDeadline", 504, "upstream_deadline"),
        ("RunDeadline", 504, "total_deadline"),
    ],
)
def test_status_and_code_are_stable(name: str, status: int, code: str) -> None:
    """Callers depend on these: a change of one is a change of the interface."""
    kind = getattr(errors, name, None) or getattr(outages, name)

    assert (kind.status, kind.code) == (status, code)


@pytest.mark.parametrize(
    ("problem", "headers"),
    [
        (
            CredentialMissing(),
            [(b"www-authenticate", b'Bearer realm="agent"'), (b"www-authenticate", b'ApiKey realm="agent"')],
        ),
        (
            CredentialInvalid(),
            [
                (b"www-authenticate", b'Bearer realm="agent", error="invalid_token"'),
                (b"www-authenticate", b'ApiKey realm="agent"'),
            ],
        ),
        (MalformedCredential(), [(b"www-authenticate", b'Bearer realm="agent", error="invalid_request"')]),
        (
            ScopeMissing("agent:invoke"),
            [(b"www-authenticate", b'Bearer realm="agent", error="insufficient_scope", scope="agent:invoke"')],
        ),
        (MethodNotAllowed("GET, DELETE"), [(b"allow", b"GET, DELETE")]),
        (BodyTimeout(), [(b"connection", b"close")]),
        (BodyTooLarge(9), []),
        (MADE[RateExceeded], [(b"ratelimit", b'"a";r=0;t=18'), (b"retry-after", b"18")]),
        (Draining(), [(b"retry-after", b"1"), (b"connection", b"close")]),
        (PoolExhausted(), [(b"retry-after", b"1")]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Problem) else "",
)
def test_a_problem_adds_its_fields(problem: Problem, headers: Headers) -> None:
    """Challenges, what is allowed, when to come again: exactly these fields."""
    assert problem.headers() == headers


@KINDS
def test_no_other_problem_adds_a_field(kind: type[Problem]) -> None:
    """Retry-After comes with 429 and 503 alone, a challenge with 400, 401 and 403."""
    names = {name for name, _ in made(kind).headers()}

    assert (b"retry-after" in names) == (kind.status in (429, 503))
    assert (b"www-authenticate" in names) <= (kind.status in (400, 401, 403))
    assert names <= {b"retry-after", b"www-authenticate", b"allow", b"connection", b"ratelimit"}


@pytest.mark.parametrize("kind", [CredentialMissing, CredentialInvalid])
def test_one_refusal_for_every_reason(kind: type[Problem]) -> None:
    """Two credentials that prove nothing for two reasons are answered alike."""
    one, other = kind(reason="unknown key"), kind(reason="ExpiredSignatureError")

    assert told(one) == told(other)
    assert one.headers() == other.headers()


def test_a_spent_quota_names_its_policies() -> None:
    """The RateLimit draft's type, and which of the caller's quotas it was."""
    body = told(MADE[RateExceeded])

    assert body["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert body["violated-policies"] == ["a", "b"]
    assert body["detail"] == "Try again in 18 seconds."


@pytest.mark.parametrize("kind", [Draining, PoolExhausted])
def test_an_overload_says_so(kind: type[Problem]) -> None:
    """What passes by itself has the type for it."""
    assert told(kind())["type"] == "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


def test_details_say_what_would_do() -> None:
    """A caller is told the limit, the scope and the methods."""
    details = [BodyTooLarge(1024).detail, ScopeMissing("agent:stop").detail, MethodNotAllowed("GET").detail]

    assert details == ["The limit is 1024 bytes.", "This operation needs the scope agent:stop.", "Allowed: GET."]


def test_nothing_more_to_say_is_not_said() -> None:
    """A problem without a detail has no member for it."""
    problem = Problem()

    assert "detail" not in told(problem)
    assert str(problem) == problem.title


@given(st.text(), st.text(), st.text())
def test_any_words_make_a_body(detail: str, instance: str, request_id: str) -> None:
    """Whatever a detail or a path holds, the body is JSON that says it."""
    raw = Problem(detail).body(instance=instance, request_id=request_id)

    body = json.loads(raw)

    assert body.get("detail", "") == detail
    assert (body["instance"], body["request_id"]) == (instance, request_id)
