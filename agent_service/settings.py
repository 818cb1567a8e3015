"""Reads what the agent needs from its environment, and refuses to start on anything doubtful.

It never opens a file or a connection, and never puts a secret's value into a message.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOCAL = "local"
PROVIDER = "openai"
DEFAULT_DATABASE = Path(".agentflow/threads.sqlite")
SECRET_BYTES = 32
"""RFC 7518, section 3.2: a key for HS256 has at least the size of its hash."""


class SettingsError(ValueError):
    """Says, a sentence a line, everything that is wrong with the environment."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the agent runs on; secrets stay out of its repr."""

    model: str
    base_url: str | None
    api_key: str | None = field(repr=False)
    database: Path
    postgres_dsn: str | None = field(repr=False)
    redis_url: str | None = field(repr=False)


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read settings from an environment, where an empty variable is an absent one.

    Raises SettingsError with one sentence per fault, all of them at once.
    """
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    model = given.get("AGENT_MODEL", LOCAL)
    faults = [*_token_faults(given), *_model_faults(model, given), *_storage_faults(given)]
    if faults:
        raise SettingsError("\n".join(faults))
    return Settings(
        model=model,
        base_url=given.get("OPENAI_BASE_URL"),
        api_key=given.get("OPENAI_API_KEY"),
        database=Path(given.get("AGENT_DATABASE", DEFAULT_DATABASE)),
        postgres_dsn=given.get("AGENT_POSTGRES_DSN"),
        redis_url=given.get("AGENT_REDIS_URL"),
    )


def _storage_faults(given: Mapping[str, str]) -> list[str]:
    # AgentFlow's shared store keeps threads in the one and what is going on in the other.
    pair = ("AGENT_POSTGRES_DSN", "AGENT_REDIS_URL")
    missing = [name for name in pair if not given.get(name)]
    if len(missing) != 1:
        return []
    return [
        f"{missing[0]} is missing: AGENT_POSTGRES_DSN and AGENT_REDIS_URL are set together or not at all."
    ]


def _token_faults(given: Mapping[str, str]) -> list[str]:
    faults = []
    if len(given.get("JWT_SECRET_KEY", "").encode()) < SECRET_BYTES:
        faults.append(
            f"JWT_SECRET_KEY must be at least {SECRET_BYTES} bytes that only the proxy and this agent know."
        )
    # AgentFlow refuses to start without it, and would accept `none` or a public key's name.
    if given.get("JWT_ALGORITHM") != "HS256":
        faults.append("JWT_ALGORITHM must be HS256.")
    return faults


def _model_faults(model: str, given: Mapping[str, str]) -> list[str]:
    if model == LOCAL:
        return []
    provider, _, name = model.partition("/")
    if provider != PROVIDER or not name:
        return [f"AGENT_MODEL is {model!r}; it must be {LOCAL!r} or '{PROVIDER}/<model>'."]
    if not given.get("OPENAI_API_KEY"):
        return [f"OPENAI_API_KEY is missing: AGENT_MODEL is {model!r}. A server without keys takes any text."]
    return []
