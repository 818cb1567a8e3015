"""What an operator can set, with each setting's default and what is wrong with a value; `environment` reads them."""

import hmac
import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
)

from proxy.exchangesettings import ExchangeSettings
from proxy.flowsettings import FlowSettings
from proxy.issuers import MIN_SECRET_BYTES, SHORT_SECRET
from proxy.keys import parse_keys
from proxy.limitsettings import LimitSettings, RedisUrl
from proxy.model import Deadlines
from proxy.origin import Origin
from proxy.overloadsettings import OverloadSettings
from proxy.publickeys import shared_key
from proxy.storedkeys import StoredKey
from proxy.telemetrysettings import TelemetrySettings
from proxy.tokensettings import Seconds, TokenSettings

DATABASE_FORMS: Final = "sqlite+aiosqlite:///<file> or postgresql+asyncpg://<user>@<host>/<database>"
MIGRATE_FIRST: Final = "PROXY_DATABASE_URL: the schema is not this version's; run: agentflow-proxy migrate"
_DATABASE: Final = re.compile(r"sqlite\+aiosqlite:///[^:?].*|postgresql\+asyncpg://.+")


def _secret(value: object) -> object:
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("must be printable text")
    if isinstance(value, str) and len(value.encode()) < MIN_SECRET_BYTES:
        raise ValueError(SHORT_SECRET)
    if isinstance(value, str):
        shared_key(value)  # the first use would say so too, but that is a request
    return value


def _database_url(value: object) -> object:
    if isinstance(value, str) and _DATABASE.match(value) is None:
        raise ValueError(f"must be {DATABASE_FORMS}")
    return value


type Secret = Annotated[SecretStr, BeforeValidator(_secret)]
type DatabaseUrl = Annotated[SecretStr, BeforeValidator(_database_url)]


class Settings(LimitSettings, FlowSettings, ExchangeSettings, OverloadSettings, TokenSettings, TelemetrySettings):
    """Every setting, with its default. A field `name` is the variable `PROXY_NAME`."""

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0: a free one")] = 8000
    agent_url: Annotated[str, Field(description="where the sidecar listens; http+unix:///path: a Unix socket")] = (
        "http://127.0.0.1:8001"
    )
    agent_secret: Annotated[Secret, Field(description="signs the internal token; the sidecar's JWT_SECRET_KEY")]
    agent_issuer: Annotated[
        str | None, Field(min_length=1, description="the internal token's iss; the sidecar's JWT_ISSUER")
    ] = "agentflow-proxy"
    agent_audience: Annotated[
        str | None,
        Field(min_length=1, description="the internal token's aud; the sidecar's JWT_AUDIENCE, which must match"),
    ] = None
    thread_secret: Annotated[
        Secret | None, Field(description="keys the thread tags; unset: derived from the agent secret")
    ] = None
    api_keys: Annotated[tuple[StoredKey, ...], Field(description="[[keys]] in TOML")] = ()
    database_url: Annotated[DatabaseUrl | None, Field(description="where keys are kept; unset: api_keys alone")] = None
    key_store_grace_seconds: Annotated[
        float, Field(ge=5, le=86_400, description="known keys go on for this long while the database is down")
    ] = 300
    audit_file: Annotated[Path | None, Field(description="gets the audit log; unset: with the other lines")] = None
    max_body_bytes: Annotated[int, Field(ge=1024, le=64 << 20, description="largest request body")] = 1 << 20
    body_timeout_seconds: Annotated[Seconds, Field(description="for the whole request body")] = 30
    allow_system_messages: Annotated[bool, Field(description='let callers send role "system"')] = False
    allow_client_tools: Annotated[bool, Field(description="let AG-UI's callers offer the model tools of their own")] = (
        False
    )
    max_recursion_limit: Annotated[int, Field(ge=1, le=100, description="largest recursion_limit")] = 50
    default_thread: Annotated[
        Literal["new", "standing"],
        Field(description="who names no thread gets a new one, or always the same"),
    ] = "new"
    connect_timeout_seconds: Annotated[Seconds, Field(description="for the sidecar to accept")] = 3
    first_byte_timeout_seconds: Annotated[Seconds, Field(description="for a run's answer to begin")] = 660
    idle_timeout_seconds: Annotated[Seconds, Field(description="between a run's bytes")] = 660
    total_timeout_seconds: Annotated[Seconds, Field(description="for a whole run")] = 3600
    query_timeout_seconds: Annotated[Seconds, Field(description="for every answer that is not a run")] = 30
    pool_connections: Annotated[
        int, Field(ge=1, le=65_536, description="most upstream connections, beside 256 to stop runs")
    ] = 4096
    pool_idle_connections: Annotated[int, Field(ge=0, le=65_536, description="most kept alive while idle")] = 64
    pool_idle_seconds: Annotated[
        Seconds, Field(description="idle connections are closed after this; less than the sidecar's 2 to 5 s")
    ] = 1.5
    trusted_hops: Annotated[int, Field(ge=0, le=16, description="proxies before us that set X-Forwarded-For")] = 0
    grace_seconds: Annotated[
        int, Field(ge=0, le=3600, description="running answers may take this long after SIGTERM")
    ] = 30
    drain_delay_seconds: Annotated[
        float, Field(ge=0, le=60, description="after SIGTERM, /health/ready says 503 this long before the port closes")
    ] = 0
    docs: Annotated[bool, Field(description="serve /docs and /openapi.json")] = True

    @field_validator("agent_url")
    @classmethod
    def _is_origin(cls, value: str) -> str:
        Origin.of(value)
        return value.rstrip("/")

    @field_validator("api_keys", mode="before")
    @classmethod
    def _are_keys(cls, value: object) -> object:
        return parse_keys(value) if isinstance(value, str) else value

    def run_deadlines(self) -> Deadlines:
        """Give the deadlines of invoke and stream."""
        return Deadlines(
            self.connect_timeout_seconds,
            self.first_byte_timeout_seconds,
            self.idle_timeout_seconds,
            self.total_timeout_seconds,
        )

    def query_deadlines(self) -> Deadlines:
        """Give the deadlines of everything else."""
        limit = self.query_timeout_seconds
        return Deadlines(min(self.connect_timeout_seconds, limit), limit, limit, limit)

    def secret_of_tags(self) -> bytes:
        """Give the key of the thread tags: its own, or one derived from the agent secret (HMAC, own label)."""
        if self.thread_secret is not None:
            return self.thread_secret.get_secret_value().encode()
        return hmac.digest(self.agent_secret.get_secret_value().encode(), b"agentflow-proxy/thread-tag", "sha256")


class KeySettings(BaseModel):
    """What the commands that write keys need; the same variables as the proxy's own."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    database_url: DatabaseUrl
    audit_file: Path | None = None
    redis_url: RedisUrl | None = None
    redis_prefix: str = "agentflow-proxy"
