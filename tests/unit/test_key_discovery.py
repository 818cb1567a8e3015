"""Where a provider's own description may send us for its keys, and how long what came from there lasts."""

import pytest

from proxy.claims import ClaimRules
from proxy.issuers import Issuer
from proxy.jwks import Document, DocumentError, FetchRules, RemoteKeys
from proxy.outages import KeysUnavailable
from proxy.publickeys import PUBLIC
from tests.support.jose import make_signer

DESCRIPTION = "/.well-known/openid-configuration"


@pytest.mark.parametrize(
    ("issuer", "described", "found"),
    [
        ("https://idp.test", "https://idp.test/jwks", 1),
        ("https://idp.test", "https://keys.test/jwks", 1),
        ("https://idp.test", "HTTPS://keys.test/jwks", 1),
        ("HTTPS://idp.test", "http://127.0.0.1:8001/jwks", 0),
        ("https://idp.test", "http://127.0.0.1:8001/v1/graph", 0),
        ("https://idp.test", "http://localhost/jwks", 0),
        ("https://idp.test", "http://[::1]/jwks", 0),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000/jwks", 1),
        ("http://127.0.0.1:9000", "https://keys.test/jwks", 1),
    ],
)
async def test_a_stranger_does_not_send_us_to_this_machine(issuer: str, described: str, found: int) -> None:
    """A description from afar that names http, which is this machine's own, is asked for nothing there."""
    signer = make_signer("ES256")
    asked = []

    async def fetch(url: str) -> Document:
        asked.append(url)
        told = {"issuer": issuer, "jwks_uri": described} if url.endswith(DESCRIPTION) else {"keys": [signer.jwk()]}
        return Document(told, None)

    rules = ClaimRules(issuer=issuer, audience="agentflow-proxy")
    made = Issuer(rules=rules, algorithms=PUBLIC, url=issuer + DESCRIPTION, discovers=True)
    keys = RemoteKeys(made, fetch, rules=FetchRules())

    if found:
        assert len(await keys.find(signer.id, "ES256")) == found
    else:
        with pytest.raises(KeysUnavailable):
            await keys.find(signer.id, "ES256")
    assert asked == [issuer + DESCRIPTION, described][: 1 + found]


def clocked(rules: FetchRules, now: list[float]) -> tuple[RemoteKeys, list[bool]]:
    """Make the keys of a provider whose next answers are given in a list: good or not, then good for ever."""
    signer = make_signer("EdDSA")
    answers: list[bool] = []

    async def fetch(_: str) -> Document:
        if answers and not answers.pop(0):
            raise DocumentError("down")
        return Document({"keys": [signer.jwk()]}, None)

    issuer = Issuer(rules=ClaimRules(issuer="https://idp.test"), algorithms=PUBLIC, url="https://idp.test/jwks")
    return RemoteKeys(issuer, fetch, rules=rules, clock=lambda: now[0]), answers


@pytest.mark.parametrize("step", [1, 7, 59, 60, 61, 500])
async def test_a_healthy_provider_is_never_unavailable(step: float) -> None:
    """However seldom somebody asks, and though keys end in the moment in which they are due, there are keys."""
    now = [0.0]
    keys, _ = clocked(FetchRules(fresh=60, stale=60, cooldown=60), now)

    for _ in range(200):
        assert len(await keys.find("k1", "EdDSA")) == 1
        now[0] += step


async def test_keys_that_ended_are_waited_for() -> None:
    """When the last set counts no more, whoever comes waits for a fetch, although the last one failed."""
    now = [0.0]
    keys, answers = clocked(FetchRules(fresh=60, stale=100, cooldown=10), now)
    await keys.find("k1", "EdDSA")
    answers += [False]
    now[0] = 70
    assert len(await keys.find("k1", "EdDSA")) == 1

    now[0] = 101

    assert len(await keys.find("k1", "EdDSA")) == 1
