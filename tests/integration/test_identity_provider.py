"""A real proxy process and a real provider on this machine, which rotates, hangs, lies and comes back.

Nothing below needs an agent: who is let in is told that there is no such path, who is not is told 401 or 503.
"""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.jose import Signer, make_signer
from tests.support.oidc import Provider, eventually, run_provider
from tests.support.proxy import Proxy, ProxyStoppedError, start_proxy, stop_proxy

AGENT = "http://127.0.0.1:9"
AGENT_SECRET = "a" * 40
IN, REFUSED, UNAVAILABLE = 404, 401, 503
QUICK = {
    "PROXY_JWKS_COOLDOWN_SECONDS": "0.1",
    "PROXY_JWKS_TIMEOUT_SECONDS": "0.5",
    "PROXY_JWKS_REFRESH_SECONDS": "0.5",
    "PROXY_AUTH_FAILURE_LIMIT": "off",
    "PROXY_RATE_LIMIT": "off",
}
SUBJECTS = (f"user-{number}" for number in range(1_000_000))
type Start = Callable[..., Proxy]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start proxies with these issuers and settings; stop them in the end."""
    with ExitStack() as stack:

        def started(*entries: str, **settings: str) -> Proxy:
            file = tmp_path / "issuers.toml"
            file.write_text("\n".join(entries))
            issuers = {"PROXY_ISSUERS_FILE": str(file)} if entries else {}
            proxy = start_proxy(tmp_path, AGENT, AGENT_SECRET, **(QUICK | issuers | settings))
            stack.callback(stop_proxy, proxy.process)
            return proxy

        yield started


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Run a provider with one key."""
    with run_provider() as running:
        yield running


def met(proxy: Proxy, token: str) -> int:
    """Present a token; give the status that it meets."""
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.get(f"{proxy.url}/agent/nowhere", headers=headers, timeout=20, trust_env=False).status_code


def fresh(provider: Provider, signer: Signer | None = None) -> str:
    """Sign a token that no proxy has seen, so that none is let in from memory."""
    return provider.token(next(SUBJECTS), signer)


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
def test_the_issuers_url_is_enough(start: Start, algorithm: str) -> None:
    """Keys of every kind are found from the issuer's URL and its own description alone, and fetched once."""
    with run_provider(signers=[make_signer(algorithm)]) as provider:
        proxy = start(provider.entry(), PROXY_JWKS_REFRESH_SECONDS="600")

        statuses = [met(proxy, fresh(provider)) for _ in range(3)]
        forged = met(proxy, fresh(provider, make_signer(algorithm)))

        assert statuses == [IN] * 3
        assert forged == REFUSED
        assert provider.asked == ["/.well-known/openid-configuration", "/jwks"]


def test_several_issuers_are_told_apart(start: Start) -> None:
    """Each has its own keys: one provider's signature is nothing under the other's name."""
    with run_provider() as one, run_provider(signers=[make_signer("ES256")]) as other:
        proxy = start(one.entry(), other.entry(jwks_url=f"{other.issuer}/jwks"))

        assert [met(proxy, fresh(one)), met(proxy, fresh(other))] == [IN, IN]
        assert met(proxy, one.token("mallory", other.signers[0])) == REFUSED
        assert met(proxy, other.token("mallory", one.signers[0])) == REFUSED
        assert met(proxy, one.token("mallory", iss="https://nobody.test")) == REFUSED


def test_a_provider_rotates_its_keys(start: Start, provider: Provider) -> None:
    """A new key counts as soon as a token names it; one that was withdrawn stops counting at the next refresh."""
    old, new = provider.signers[0], make_signer("RS256", "k2")
    proxy = start(provider.entry())
    before = met(proxy, fresh(provider))

    provider.signers = [old, new]
    both = [eventually(lambda: met(proxy, fresh(provider, new)) == IN), met(proxy, fresh(provider, old))]
    provider.signers = [new]
    gone = eventually(lambda: met(proxy, fresh(provider, old)) == REFUSED)

    assert before == IN
    assert both[1] == IN
    assert both[0] < 2
    assert gone < 3
    assert met(proxy, fresh(provider, new)) == IN


def test_whoever_was_let_in_with_a_withdrawn_key_is_let_in_no_more(start: Start, provider: Provider) -> None:
    """What is remembered of a token does not outlive its key: also a token that was seen before stops counting."""
    proxy = start(provider.entry(), PROXY_JWKS_REFRESH_SECONDS="1")
    stolen = provider.token("mallory")
    before = met(proxy, stolen)

    provider.signers = [make_signer("RS256", "k2")]
    eventually(lambda: met(proxy, stolen) == REFUSED)

    assert before == IN


BAD = [
    "hang", "drip", "garbage", "a list", "too deep", "no keys", "broken keys", "error", "redirect", "huge", "endless",
    "gzip", "cut", "not HTTP",
]  # fmt: skip


@pytest.mark.parametrize("mode", BAD)
def test_a_provider_that_fails_takes_no_good_key_away(start: Start, provider: Provider, mode: str) -> None:
    """Whatever it does once its keys are known, they go on proving new tokens, at once; and a new key comes later."""
    proxy = start(provider.entry())
    assert met(proxy, fresh(provider)) == IN

    provider.mode = mode
    eventually(lambda: any(line["event"] == "keys.fetch_failed" for line in ticked(proxy, provider)))
    started = time.monotonic()
    statuses = [met(proxy, fresh(provider)) for _ in range(10)]
    took = time.monotonic() - started
    forged = met(proxy, fresh(provider, make_signer("RS256")))
    provider.mode, provider.signers = "good", [*provider.signers, make_signer("RS256", "k2")]

    assert statuses == [IN] * 10
    assert took < 5
    assert forged == REFUSED
    eventually(lambda: met(proxy, fresh(provider)) == IN)
    assert "/elsewhere" not in provider.asked


def ticked(proxy: Proxy, provider: Provider) -> list[dict[str, object]]:
    """Have the proxy look at its keys once more, and read what it logged."""
    met(proxy, fresh(provider))
    return proxy.log_lines()


@pytest.mark.parametrize("mode", ["hang", "garbage", "no keys", "redirect", "huge", "not HTTP"])
def test_a_provider_that_never_worked_is_not_a_refusal(start: Start, provider: Provider, mode: str) -> None:
    """Without any keys nothing can be said of a token: 503 with a time to come back, never 200, and no guess."""
    provider.mode = mode
    proxy = start(provider.entry())

    headers = {"Authorization": f"Bearer {fresh(provider)}"}
    answer = httpx.get(f"{proxy.url}/agent/nowhere", headers=headers, timeout=20)
    provider.mode = "good"

    assert answer.status_code == UNAVAILABLE
    assert answer.json()["code"] == "keys_unavailable"
    assert "retry-after" in answer.headers
    eventually(lambda: met(proxy, fresh(provider)) == IN)


def test_keys_do_not_outlive_their_provider_for_ever(start: Start, provider: Provider) -> None:
    """After `PROXY_JWKS_STALE_SECONDS` without a good answer the last keys count no more."""
    proxy = start(provider.entry(), PROXY_JWKS_STALE_SECONDS="2")
    assert met(proxy, fresh(provider)) == IN

    provider.mode = "error"
    took = eventually(lambda: met(proxy, fresh(provider)) == UNAVAILABLE)

    assert took > 1


def test_unknown_keys_cost_the_provider_nothing(start: Start, provider: Provider) -> None:
    """Any number of made-up key ids is one fetch, until the cooldown is over."""
    slow = {
        "PROXY_JWKS_COOLDOWN_SECONDS": "60",
        "PROXY_JWKS_REFRESH_SECONDS": "600",
        "PROXY_JWKS_TIMEOUT_SECONDS": "20",
    }
    proxy = start(provider.entry(), **slow)

    statuses = [met(proxy, fresh(provider, make_signer("ES256", secrets.token_hex(4)))) for _ in range(30)]

    assert statuses == [REFUSED] * 30
    assert met(proxy, fresh(provider)) == IN
    assert provider.asked.count("/jwks") == 1


def test_a_description_must_be_the_issuers_own(start: Start, provider: Provider) -> None:
    """Another name in it, even by a slash, or keys at an address that is neither https nor here: no keys."""
    proxy = start(provider.entry())

    for described_as, keys_at in (
        (f"{provider.issuer}/", ""),
        ("https://evil.test", ""),
        ("", "http://192.0.2.1/jwks"),
        ("", "file:///etc/passwd"),
        ("", f"http://user@127.0.0.1:{provider.port}/jwks"),
    ):
        provider.described_as, provider.keys_at = described_as, keys_at
        assert met(proxy, fresh(provider)) == UNAVAILABLE
    provider.described_as = provider.keys_at = ""

    eventually(lambda: met(proxy, fresh(provider)) == IN)
    assert provider.asked.count("/jwks") <= 2


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ('issuer = "http://idp.test"\naudience = "x"', "must be an https URL"),
        ('issuer = "https://idp.test"\naudience = "x"\njwks_url = "http://192.0.2.1/"', "must be an https URL"),
        ('issuer = "https://idp.test"\naudience = "x"\njwks_url = "ftp://idp.test/"', "must be an https URL"),
        ('issuer = "https://idp.test"', "audience: Field required"),
        ('audience = "x"', "issuer: Field required"),
        ('issuer = "https://idp.test"\naudience = "x"\nalgorithms = ["none"]', "algorithms"),
        ('issuer = "https://idp.test"\naudience = "x"\nalgorithms = ["HS256"]', "algorithms must be among"),
        ('issuer = "https://idp.test"\naudience = "x"\npublic_key_files = ["/nowhere"]', "cannot be read"),
        ('issuer = "https://idp.test"\naudience = "x"\nsecret_file = "/dev/null"', "at least 32 bytes"),
        ('issuer = "https://idp.test"\naudience = "x"\nfoo = 1', "foo: Extra inputs"),
    ],
)
def test_a_faulty_issuer_stops_the_start(start: Start, entry: str, sentence: str) -> None:
    """With a sentence for it, and before anything is fetched."""
    with pytest.raises(ProxyStoppedError, match=sentence):
        start(f"[[issuers]]\n{entry}\n")


def test_every_fault_of_every_issuer_is_told_at_once(start: Start) -> None:
    """One start tells everything that has to be put right."""
    with pytest.raises(ProxyStoppedError) as stopped:
        start('[[issuers]]\nissuer = "http://idp.test"\naudience = "x"', "[[issuers]]\nleeway_seconds = -1\nfoo = 1")

    told = str(stopped.value)
    for sentence in (
        "issuers.0: must be an https URL",
        "issuers.1.issuer: ",
        "issuers.1.leeway_seconds: ",
        "issuers.1.foo",
    ):
        assert sentence in told


def test_keys_may_be_a_file(start: Start, provider: Provider, tmp_path: Path) -> None:
    """Public keys in PEM need no provider to be reachable; two files are two keys."""
    other = make_signer("EdDSA", "k9")
    files = [tmp_path / "one.pem", tmp_path / "two.pem"]
    for file, signer in zip(files, (provider.signers[0], other), strict=True):
        file.write_bytes(signer.pem())
    provider.mode = "error"
    proxy = start(provider.entry(public_key_files=[str(file) for file in files]))

    assert [met(proxy, fresh(provider)), met(proxy, fresh(provider, other))] == [IN, IN]
    assert met(proxy, fresh(provider, make_signer("RS256"))) == REFUSED
    assert provider.asked == []


def shared(secret: str) -> dict[str, str]:
    """Give the settings of an issuer with shared secrets."""
    return {"PROXY_JWT_SECRET": secret, "PROXY_JWT_ISSUER": "https://us.test", "PROXY_JWT_AUDIENCE": "agentflow-proxy"}


def signed_by_command(directory: Path, secret: str) -> str:
    """Have `agentflow-proxy token` sign a token."""
    command = [Path(sys.executable).with_name("agentflow-proxy"), "token", "--subject", next(SUBJECTS)]
    environment = shared(secret) | {"PROXY_AGENT_SECRET": AGENT_SECRET}
    return subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, check=True, text=True, timeout=30
    ).stdout.strip()


def test_a_shared_secret_is_rotated(start: Start, tmp_path: Path) -> None:
    """Old alone, then both, then new alone, a restart between: each token counts while its secret is listed.

    The command signs with the last of them, so the new one is added before anybody signs with it.
    """
    old, new = secrets.token_urlsafe(48), secrets.token_urlsafe(48)
    lists = [old, f"{old}\n{new}", new]
    by_old, by_new, by_both = (signed_by_command(tmp_path, secret) for secret in (old, new, lists[1]))

    statuses = []
    for secret in lists:
        proxy = start(**shared(secret))
        statuses.append([met(proxy, token) for token in (by_old, by_new, by_both)])
        stop_proxy(proxy.process)

    assert statuses == [[IN, REFUSED, REFUSED], [IN, IN, IN], [REFUSED, IN, IN]]


def test_what_is_revoked_is_refused_everywhere_within_five_seconds(
    start: Start, provider: Provider, tmp_path: Path
) -> None:
    """A token that two running proxies remember as proven stops at both, as does a subject; others go on."""
    file = tmp_path / "revocations.jsonl"
    file.write_text("# nobody\n")
    proxies = [start(provider.entry(), PROXY_REVOCATIONS_FILE=str(file)) for _ in range(2)]
    told, subject, other = provider.token(jti="t-1"), provider.token("bob"), provider.token("carol", jti="t-2")
    assert [met(proxy, token) for proxy in proxies for token in (told, subject, other)] == [IN] * 6

    file.write_text('{"jti": "t-1"}\n')
    for_token = eventually(lambda: [met(proxy, told) for proxy in proxies] == [REFUSED] * 2)
    file.write_text(
        json.dumps({"jti": "t-1"}) + "\n" + json.dumps({"subject": "bob", "issuer": provider.issuer}) + "\n"
    )
    for_subject = eventually(lambda: [met(proxy, subject) for proxy in proxies] == [REFUSED] * 2)

    assert max(for_token, for_subject) < 5
    assert [met(proxy, provider.token("bob")) for proxy in proxies] == [REFUSED] * 2
    assert [met(proxy, told) for proxy in proxies] == [REFUSED] * 2
    assert [met(proxy, other) for proxy in proxies] == [IN] * 2


def test_a_revocation_file_that_went_bad_gives_nobody_back(start: Start, provider: Provider, tmp_path: Path) -> None:
    """Broken, then gone: what was revoked stays so, the log says why; and a good file counts again."""
    file = tmp_path / "revocations.jsonl"
    file.write_text('{"subject": "alice"}\n')
    proxy = start(provider.entry(), PROXY_REVOCATIONS_FILE=str(file))
    token = provider.token()
    assert met(proxy, token) == REFUSED

    for spoil in (lambda: file.write_text('{"subject": "alice"'), file.unlink):
        before = proxy.log.read_text().count("revocations.kept")
        spoil()
        eventually(lambda seen=before: met(proxy, token) != REFUSED or kept(proxy) > seen)  # type: ignore[misc]
        assert met(proxy, token) == REFUSED
    file.write_text("")

    eventually(lambda: met(proxy, token) == IN)


def kept(proxy: Proxy) -> int:
    """Count how often the proxy kept what it knew."""
    return proxy.log.read_text().count("revocations.kept")


def test_no_token_is_in_the_log(start: Start, provider: Provider) -> None:
    """Neither a refused one nor a proven one, nor any part of its signature; the reason is."""
    proxy = start(provider.entry())
    tokens = [provider.token(), provider.token("eve", make_signer("RS256"))]

    for token in tokens:
        met(proxy, token)
    line = proxy.line_of(status=REFUSED)

    assert line["reason"] == "signature"
    assert not [token for token in tokens if token.rpartition(".")[2][:20] in proxy.log.read_text()]
