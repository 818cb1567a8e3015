"""When a proxy whose key store is down still has callers to serve."""

from pathlib import Path

import pytest

from proxy.app import _lack
from proxy.environment import load
from proxy.keycache import KeyCache
from proxy.keys import StaticKeyStore

ENVIRONMENT = {"PROXY_AGENT_SECRET": "a" * 48, "PROXY_DATABASE_URL": "sqlite+aiosqlite:///keys.db"}


@pytest.mark.parametrize(("issuers", "told"), [(False, "key_store_down"), (True, "")])
def test_a_proxy_with_issuers_does_not_need_its_key_store(tmp_path: Path, issuers: bool, told: str) -> None:
    """Tokens are proven without it, so no balancer may take the proxy away from those who bring them."""
    file = tmp_path / "issuers.toml"
    file.write_text('[[issuers]]\nissuer = "https://idp.test"\naudience = "agentflow-proxy"\n')
    settings = load(ENVIRONMENT | ({"PROXY_ISSUERS_FILE": str(file)} if issuers else {}))
    now = [0.0]
    keys = KeyCache(StaticKeyStore([]), grace=5, ticks=lambda: now[0])

    now[0] = 6

    assert _lack(settings, keys) == told
