"""Runs what each kind of checkpointer needs, for an agent to keep its threads in."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.postgres import running_postgres
from tests.support.redis import running_redis

DEADLINE = 60.0


@contextmanager
def storage(kind: str) -> Iterator[dict[str, str]]:
    """Run what `memory`, `sqlite` or `postgres` needs, and give the agent's settings for it."""
    if kind != "postgres":
        yield {"memory": {"AGENT_DATABASE": "memory"}, "sqlite": {}}[kind]
        return
    with running_postgres() as postgres, running_redis() as redis:
        dsn = f"postgresql://proxy@127.0.0.1:{postgres.port}/postgres"
        settings = {"AGENT_POSTGRES_DSN": dsn, "AGENT_REDIS_URL": redis.url}
        command = [sys.executable, "-m", "agent_service.checkpoints"]
        subprocess.run(command, env={"PATH": os.defpath} | settings, check=True, timeout=DEADLINE)
        yield settings
