"""What a contender is: a name, and a way to write its configuration and say how it is started.

Starts nothing; a contender that cannot be had here raises AbsentError with the reason.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

NEVER = 1_000_000_000  # requests a minute that no caller here reaches
ROOT = Path(__file__).resolve().parents[2]


class AbsentError(Exception):
    """The contender is not installed, or not able to do the job here; says why in words that name no path."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one run of a contender lives: its directory, its port, the stub's, spare ones, its limit per caller.

    The stub listens on a Unix socket too.
    """

    directory: Path
    port: int
    upstream: int
    spare: tuple[int, int]
    ours: Path
    per_minute: int = NEVER
    upstream_socket: Path | None = None

    def write(self, name: str, text: str) -> Path:
        """Write a configuration file and give its path."""
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        return path


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a contender: its commands, in order, and where it answers."""

    version: str
    commands: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    invoke: str = "/v1/graph/invoke"
    stream: str = "/v1/graph/stream"
    ready_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table; `job` says how it does what the row claims."""

    key: str
    title: str
    job: str
    prepare: Callable[[Place], Launch]
    ours: bool = False


def find_version(*packages: str) -> str:
    """Give the versions of installed `packages`, joined. Raises AbsentError for one that is not installed."""
    try:
        return ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    except metadata.PackageNotFoundError as error:
        raise AbsentError(f"the package {error.name} is not installed in the benchmark's environment") from error


def find_command(name: str, package: str) -> str:
    """Give the path of the command `name` that `package` brought. Raises AbsentError without it."""
    find_version(package)
    found = shutil.which(name, path=f"{sysconfig.get_path('scripts')}:{Path(sys.executable).parent}")
    if found is None:
        raise AbsentError(f"the package {package} brought no command {name}")
    return found


def plain_environment(**more: str) -> dict[str, str]:
    """Give a child's environment: the path, a locale, nothing of the caller's, and `more`."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": os.devnull} | more
