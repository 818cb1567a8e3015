"""Where a provider's own description may send us for its keys."""

import pytest

from proxy.claims import ClaimRules
from proxy.issuers import Issuer
from proxy.jwks import Document, FetchRules, RemoteKeys
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
