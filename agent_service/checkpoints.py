"""Where threads are kept: a SQLite file by default, Postgres with Redis when both are named, or nowhere.

`python -m agent_service.checkpoints` creates the tables; the agent itself never changes a shared schema.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from agentflow.core.state import AgentState
from agentflow.storage.checkpointer import BaseCheckpointer, InMemoryCheckpointer, PgCheckpointer, SqliteCheckpointer
from agentflow.utils.thread_info import ThreadInfo

from agent_service.settings import Memory, SettingsError, SqliteFile, Storage, read_storage


class OwnedSqlite(SqliteCheckpointer[AgentState]):
    """AgentFlow's SQLite store, which forgets to write down whose a thread is, and then lists nobody's to anybody."""

    @override
    async def aput_thread(self, config: dict[str, Any], thread_info: ThreadInfo) -> bool:
        return await super().aput_thread(config, _owned(config, thread_info))


class OwnedMemory(InMemoryCheckpointer[AgentState]):
    """AgentFlow's store in memory, with the same addition; and what it deletes is gone, not only unlisted."""

    @override
    async def aput_thread(self, config: dict[str, Any], thread_info: ThreadInfo) -> bool:
        return await super().aput_thread(config, _owned(config, thread_info))

    @override
    async def aclean_thread(self, config: dict[str, Any]) -> bool:
        if not await super().aclean_thread(config):
            return False
        await self.aclear_state(config)
        key = self._get_config_key(config)
        self._messages.pop(key, None)
        self._state_cache.pop(key, None)
        return True


def _owned(config: Mapping[str, Any], thread_info: ThreadInfo) -> ThreadInfo:
    owner = thread_info.user_id or config.get("user_id")
    return thread_info.model_copy(update={"user_id": owner})


def open_checkpointer(storage: Storage) -> BaseCheckpointer[AgentState]:
    """Return AgentFlow's store for this place, not yet connected.

    Raises SettingsError if the packages it needs are not installed.
    """
    if isinstance(storage, Memory):
        return OwnedMemory()  # type: ignore[no-untyped-call]
    if isinstance(storage, SqliteFile):
        _make_private(storage.path)
        return OwnedSqlite(storage.path)
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
