"""Finds the programs that no wheel ships. Only root can install them, and README promises tests without root."""

import os
import shutil

import pytest


def require(*names: str, package: str) -> str:
    """Give the path of the first that is there; without one skip the test, or fail it in CI, which installs them."""
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has to have {names[0]}: apt-get install {package}")
    # Only root can install it, and `make test` needs no root. All else is tested here, and this where CI is.
    pytest.skip(reason=f"no {names[0]}, which only root can install: apt-get install {package}; CI fails without it")
