"""The table of ends against the ends there are."""

import re
from pathlib import Path

from proxy.ends import End

STREAMING = Path(__file__).parents[2] / "docs" / "streaming.md"


def test_every_end_is_documented_and_nothing_else() -> None:
    """docs/streaming.md has one row for each End, in their order."""
    table = STREAMING.read_text().partition("## Ends")[2].partition("## ")[0]

    assert re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)[1:] == [end.value for end in End]
