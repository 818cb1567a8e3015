"""What every test shares: the event loop it runs on.

It never starts a server; those that need one say so.
"""

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have a failure of a whole installation tell what each of its parts wrote last: its directory goes away."""
    report = yield
    installation = getattr(item, "funcargs", {}).get("installation")
    if report.failed and hasattr(installation, "last_words"):
        report.sections += installation.last_words()
    return report


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, as every server here does."""
    return "asyncio"
