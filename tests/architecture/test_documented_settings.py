"""The operator's table of settings against the settings there are."""

import re
from pathlib import Path

from proxy.environment import TEXTS
from proxy.settings import Settings

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_every_setting_is_documented_and_nothing_else() -> None:
    """docs/operations.md names each variable, and no variable that does not exist."""
    told = set(re.findall(r"`PROXY_([A-Z_]+)`", OPERATIONS.read_text()))
    known = {name.upper() for name in Settings.model_fields}

    assert known <= told
    assert told - known <= {f"{name.upper()}_FILE" for name in TEXTS}
