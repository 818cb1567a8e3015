"""What every test shares: the event loop it runs on.

It never starts a server; those that need one say so.
"""

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, as every server here does."""
    return "asyncio"
