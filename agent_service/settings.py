"""Reads what the agent needs from its environment, and refuses to start on anything doubtful.

It never opens a file or a connection, and never puts a secret's value into a message.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOCAL = "local"
PROVIDER = "openai"
DEFAULT_DATABASE = Path(".agentflow/threads.sqlite")
MEMORY = "memory"
SECRET_BYTES = 32
"""RFC 7518, section 3.2: a key for HS256 has at least the size of its hash."""


class SettingsError(ValueError):
    """Says, a sentence a line, everything that is wrong with the environment."""


@dataclass(frozen=True, slots=True)
class SqliteFile:
    """Threads in a file of this machine."""

    path: Path


@dataclass(frozen=True, slots=True)
class PostgresWithRedis:
    """Threads that several agents share; both addresses carry passwords and stay out of the repr."""

    dsn: str = field(repr=False)
    redis_url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Memory:
    """Threads in this process alone, for as long as it runs."""


type Storage = SqliteFile | PostgresWithRedis | Memory


@dataclass(frozen=True, slots=True)
class Settings:
    """What the agent runs on: `local` or `openai/<model>`, the latter at `base_url` if there is one."""

    model: str
    base_url: str | None
    storage: Storage


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read settings from an environment, where an empty variable is an absent one.

    Raises SettingsError with one sentence per fault, all of them at once.
    """
    given = _present(environment)
    model = given.get("AGENT_MODEL", LOCAL)
    faults = [*_token_faults(given), *_model_faults(model, given), *_storage_faults(given)]
    if faults:
        raise SettingsError("\n".join(faults))
    return Settings(model=model, base_url=given.get("OPENAI_BASE_URL"), storage=_storage(given))


def read_storage(environment: Mapping[str, str]) -> Storage:
    """Read only where threads are kept, for those who prepare the place and hold no other secret.

    Raises SettingsError.
    """
    given = _present(environment)
    if faults := _storage_faults(given):
        raise SettingsError("\n".join(faults))
    return _storage(given)


def _present(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value.strip() for name, value in environment.items() if value.strip()}


def _storage(given: Mapping[str, str]) -> Storage:
    if "AGENT_POSTGRES_DSN" in given:
        return PostgresWithRedis(dsn=given["AGENT_POSTGRES_DSN"], redis_url=given["AGENT_REDIS_URL"])
    if given.get("AGENT_DATABASE") == MEMORY:
        return Memory()
    return SqliteFile(Path(given.get("AGENT_DATABASE", DEFAULT_DATABASE)))


def _storage_faults(given: Mapping[str, str]) -> list[str]:
    # AgentFlow's shared store keeps threads in the one and what is going on in the other.
    pair = ("AGENT_POSTGRES_DSN", "AGENT_REDIS_URL")
    missing = [name for name in pair if name not in given]
    if len(missing) != 1:
        return []
    return [f"{missing[0]} is missing: {pair[0]} and {pair[1]} are set together or not at all."]


def _token_faults(given: Mapping[str, str]) -> list[str]:
    faults = []
    if len(given.get("JWT_SECRET_KEY", "").encode()) < SECRET_BYTES:
        faults.append(f"JWT_SECRET_KEY must be at least {SECRET_BYTES} bytes that only the proxy and this agent know.")
    # AgentFlow takes any algorithm by name, and checks the secret's size for the HMAC ones alone.
    if given.get("JWT_ALGORITHM") != "HS256":
        faults.append("JWT_ALGORITHM must be HS256.")
    return faults


def _model_faults(model: str, given: Mapping[str, str]) -> list[str]:
    if model == LOCAL:
        return []
    provider, _, name = model.partition("/")
    if provider != PROVIDER or not name:
        return [f"AGENT_MODEL is {model!r}; it must be {LOCAL!r} or '{PROVIDER}/<model>'."]
    if "OPENAI_API_KEY" not in given:
        return [f"OPENAI_API_KEY is missing: AGENT_MODEL is {model!r}. A server without keys takes any text."]
    return []
