"""What is told of a faulty `[[issuers]]` table, and what is not."""

import secrets

import pytest

from proxy.issuers import parse_issuers

ISSUER = '[[issuers]]\nissuer = "https://idp.test"\naudience = "agentflow-proxy"\n'


@pytest.mark.parametrize("setting", ["secret_file = '{}'", "public_key_files = ['{}']"])
@pytest.mark.parametrize("rest", ["", "\\u0000", "x" * 5000])
def test_a_secret_where_a_file_belongs_is_not_told(setting: str, rest: str) -> None:
    """Who writes the secret instead of its file's name finds the fault by its place, and the secret in no log."""
    secret = secrets.token_urlsafe(48)
    text = ISSUER + setting.format(secret + rest).replace("'", '"')

    with pytest.raises(ValueError, match=r"issuers\.0\..*_file.*: cannot be read: ") as refused:
        parse_issuers(text)

    assert secret not in str(refused.value)
