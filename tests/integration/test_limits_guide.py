"""The examples of docs/limits.md, held against a running proxy: the policies, and what each caller is told."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.limitsettings import parse_policies
from tests.security.wire import Answer, exchange, head, json_answer, stub_upstream
from tests.support.principals import Principals
from tests.support.proxy import start_proxy, stop_proxy

GUIDE = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
SECRET = "the secret of the agent behind, 32+"
BODY = b'{"text":"hi"}'
ROW = re.compile(r"^\| (any|gold|internal) \| (ping|invoke) \| `(.+?)` \| `(.+?)` \|$", re.MULTILINE)


def the_policies() -> str:
    """Give the example's text."""
    match = re.search(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    assert match is not None
    return match[1]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Principals]]:
    """Run a proxy with the guide's policies."""
    directory, principals = tmp_path_factory.mktemp("guide"), Principals()
    (directory / "limits.toml").write_text(the_policies())
    with stub_upstream(lambda _: json_answer(b"{}")) as stub:
        settings = principals.environment() | {"PROXY_LIMITS_FILE": str(directory / "limits.toml")}
        running = start_proxy(directory, stub.url, SECRET, **settings)
        try:
            yield running.url, principals
        finally:
            stop_proxy(running.process)


def call(url: str, token: str, operation: str) -> Answer:
    """Ping or invoke."""
    bearer = ("Authorization", f"Bearer {token}")
    if operation == "ping":
        return exchange(url, head("GET", "/agent/ping", bearer))
    framing = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]
    return exchange(url, head("POST", "/agent/invoke", bearer, *framing) + BODY)


def test_the_guide_shows_every_caller() -> None:
    """Four rows are there to be tested."""
    assert len(ROW.findall(GUIDE)) == 4
    assert {policy["name"] for policy in tomllib.loads(the_policies())["policies"]} >= {"requests", "tokens"}
    parse_policies(the_policies())


@pytest.mark.parametrize(("caller", "operation", "policy", "standing"), ROW.findall(GUIDE))
def test_each_caller_is_told_what_the_guide_says(
    proxy: tuple[str, Principals], caller: str, operation: str, policy: str, standing: str
) -> None:
    """The fields of a first answer, to the letter but for the seconds."""
    url, principals = proxy
    tier = {} if caller == "any" else {"tier": caller}

    answer = call(url, principals.token(f"{caller}-{operation}", **tier), operation)

    assert answer.status == 200
    assert answer.values("ratelimit-policy") == [policy]
    assert [re.sub(r";t=\d+", "", told) for told in answer.values("ratelimit")] == [standing]


def test_what_the_guide_says_is_refused_is_refused(proxy: tuple[str, Principals]) -> None:
    """An invoke costs two of ten a minute, so that the sixth is one too many, and the moving window says which."""
    url, principals = proxy
    token = principals.token("eager")

    answers = [call(url, token, "invoke") for _ in range(6)]

    assert [answer.status for answer in answers] == [200] * 5 + [429]
    assert answers[-1].problem()["violated-policies"] == ["burst"]
    assert 1 <= int(answers[-1].values("retry-after")[0]) <= 60
