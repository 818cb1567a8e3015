"""Where threads are kept: a SQLite file by default, Postgres with Redis when both are named.

`python -m agent_service.checkpoints` creates the tables; the agent itself never changes a shared schema.
"""

import asyncio
import os
import sys
from pathlib import Path

from agentflow.core.state import AgentState
from agentflow.storage.checkpointer import BaseCheckpointer, PgCheckpointer, SqliteCheckpointer

from agent_service.settings import SettingsError, SqliteFile, Storage, read_storage


def open_checkpointer(storage: Storage) -> BaseCheckpointer[AgentState]:
    """Return AgentFlow's store for this place, not yet connected.

    Raises SettingsError if the packages it needs are not installed.
    """
    if isinstance(storage, SqliteFile):
        _make_private(storage.path)
        return SqliteCheckpointer[AgentState](storage.path)
    try:
        return PgCheckpointer[AgentState](postgres_dsn=storage.dsn, redis_url=storage.redis_url)
    except ImportError as missing:
        message = (
            "AGENT_POSTGRES_DSN and AGENT_REDIS_URL are set, but asyncpg or redis is not installed: "
            "install 10xscale-agentflow[pg_checkpoint]."
        )
        raise SettingsError(message) from missing


async def set_up(storage: Storage) -> None:
    """Create the tables that are absent; on Postgres AgentFlow never does so by itself.

    Raises SettingsError.
    """
    checkpointer = open_checkpointer(storage)
    try:
        await checkpointer.asetup()
    finally:
        await checkpointer.arelease()


def _make_private(database: Path) -> None:
    """Create the file and its directory for this user alone; SQLite gives its journals the file's mode."""
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    database.touch(mode=0o600, exist_ok=True)


def main() -> None:
    """Set up the place that the environment names."""
    try:
        asyncio.run(set_up(read_storage(os.environ)))
    except SettingsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
