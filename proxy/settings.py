"""What an operator can set: `PROXY_…` variables, each secret also as `…_FILE`; checked whole, at once, at start.

Reads the environment it is given and the files that it names; nothing else, and never later.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import limits
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)

from proxy.issuers import MIN_SECRET_BYTES, SHORT_SECRET
from proxy.keys import parse_keys
from proxy.model import Deadlines, StoredKey
from proxy.tokensettings import Seconds, TokenSettings, readable_issuers

PREFIX: Final = "PROXY_"
_ORIGIN: Final = re.compile(r"http://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}/?", re.ASCII)
_LAST_PORT: Final = 65_535
_LONGEST_WINDOW: Final = 366 * 86_400
SECRETS: Final = frozenset({"agent_secret", "jwt_secret", "thread_secret", "api_keys", "database_url"})
_DATABASE: Final = re.compile(r"sqlite\+aiosqlite:///[^:?].*|postgresql\+asyncpg://.+")


class SettingsError(Exception):
    """The environment cannot be served from; `problems` has one sentence for each fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _secret(value: object) -> object:
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("must be printable text")
    if isinstance(value, str) and len(value.encode()) < MIN_SECRET_BYTES:
        raise ValueError(SHORT_SECRET)
    return value


def _database_url(value: object) -> object:
    if isinstance(value, str) and _DATABASE.match(value) is None:
        raise ValueError("must be sqlite+aiosqlite:///<file> or postgresql+asyncpg://<user>@<host>/<database>")
    return value


def _rate(value: str) -> str:
    if value != "off":
        try:
            items = limits.parse_many(value)
            amounts = [item.amount if 0 < item.get_expiry() <= _LONGEST_WINDOW else 0 for item in items]
        except ValueError:
            amounts = []
        if not amounts or min(amounts) < 1:
            raise ValueError("must be `off` or amounts per window, such as 60/minute or 10/second;1000/day")
    return value


type Secret = Annotated[SecretStr, BeforeValidator(_secret)]
type DatabaseUrl = Annotated[SecretStr, BeforeValidator(_database_url)]
type Rate = Annotated[str, Field(description="amount/window; off")]


class Settings(TokenSettings):
    """Every setting, with its default. A field `name` is the variable `PROXY_NAME`."""

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0: a free one")] = 8000
    agent_url: Annotated[str, Field(description="where the sidecar listens")] = "http://127.0.0.1:8001"
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
    rate_limit: Annotated[Rate, Field(description="per caller")] = "60/minute"
    auth_failure_limit: Annotated[Rate, Field(description="failed credentials per address")] = "20/minute"
    legacy_rate_headers: Annotated[bool, Field(description="send X-RateLimit-… too")] = False
    max_body_bytes: Annotated[int, Field(ge=1024, le=64 << 20, description="largest request body")] = 1 << 20
    body_timeout_seconds: Annotated[Seconds, Field(description="for the whole request body")] = 30
    allow_system_messages: Annotated[bool, Field(description='let callers send role "system"')] = False
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
    pool_connections: Annotated[int, Field(ge=1, le=65_536, description="most upstream connections")] = 4096
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
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="least level logged")] = "info"

    @field_validator("agent_url")
    @classmethod
    def _is_origin(cls, value: str) -> str:
        if _ORIGIN.fullmatch(value) is None or not 0 < int(value.rstrip("/").rpartition(":")[2]) <= _LAST_PORT:
            raise ValueError("must be http://host:port, without a path")
        return value.rstrip("/")

    @field_validator("rate_limit", "auth_failure_limit")
    @classmethod
    def _is_rate(cls, value: str) -> str:
        return _rate(value)

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


class KeySettings(BaseModel):
    """What the commands that write keys need; the same variables as the proxy's own."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    database_url: DatabaseUrl
    audit_file: Path | None = None


def load(environment: Mapping[str, str]) -> Settings:
    """Read the settings from `environment`. Raises SettingsError with every problem in it.

    An empty value counts as unset. A `PROXY_` name that is no setting is a problem: it is a misspelling.
    """
    values, variables, problems = _gather(environment)
    unread = {name for name in variables if name not in values}
    settings = None
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            if name not in unread:
                problems.append(f"{variables.get(name, PREFIX + name.upper())}: {_sentence(fault)}")
    problems += _faults_between(values, set(variables))
    if settings is None or problems:
        raise SettingsError(problems)
    return settings


def load_key_settings(environment: Mapping[str, str]) -> KeySettings:
    """Read from `environment` what the commands that write keys need, and nothing else. Raises SettingsError."""
    own = {PREFIX + name.upper() + suffix for name in KeySettings.model_fields for suffix in ("", "_FILE")}
    values, _, problems = _gather({name: value for name, value in environment.items() if name in own})
    try:
        return KeySettings.model_validate(values)
    except ValidationError as error:
        faults = (f"{PREFIX}{str(fault['loc'][0]).upper()}: {_sentence(fault)}" for fault in error.errors())
        raise SettingsError(problems or list(faults)) from error


def _gather(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Give the value of each setting, the variable that set it, and what could not be read."""
    values: dict[str, str] = {}
    variables: dict[str, str] = {}
    problems: list[str] = []
    for variable in sorted(name for name, value in environment.items() if name.startswith(PREFIX) and value):
        name = variable.removeprefix(PREFIX).lower()
        secret = name.removesuffix("_file")
        if variable != variable.upper() or (name not in Settings.model_fields and secret not in SECRETS):
            problems.append(f"{variable}: is no setting; see docs/operations.md for the list")
        elif name in Settings.model_fields:
            values[name], variables[name] = environment[variable], variable
        elif secret in variables:
            problems.append(f"{variable}: set this or {PREFIX}{secret.upper()}, not both")
        else:
            variables[secret] = variable
            try:
                values[secret] = Path(environment[variable]).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                problems.append(f"{variable}: cannot be read: {_plain(error)}")
    return values, variables, problems


def _faults_between(values: Mapping[str, str], given: set[str]) -> list[str]:
    """Find what is wrong between settings, whatever is wrong with one of them."""
    faults = []
    has_keys = "api_keys" in given and _defines_keys(values.get("api_keys"))
    if not given & {"jwt_secret", "issuers_file", "database_url"} and not has_keys:
        faults.append(
            "settings: nobody could call: "
            "set PROXY_JWT_SECRET, PROXY_ISSUERS_FILE, PROXY_API_KEYS_FILE or PROXY_DATABASE_URL"
        )
    issuers = readable_issuers(values.get("issuers_file"))
    secrets = [values[name] for name in ("agent_secret", "thread_secret") if name in values]
    secrets += {line.strip() for line in values.get("jwt_secret", "").splitlines()}
    secrets += [secret for issuer in issuers for secret in issuer.secrets]
    secrets = [secret for secret in secrets if secret.isprintable() and len(secret.encode()) >= MIN_SECRET_BYTES]
    if len(secrets) != len(set(secrets)):
        faults.append("settings: PROXY_AGENT_SECRET, PROXY_JWT_SECRET and PROXY_THREAD_SECRET must differ")
    if "jwt_secret" in given and values.get("jwt_issuer") in {issuer.rules.issuer for issuer in issuers}:
        faults.append("settings: PROXY_JWT_ISSUER is in PROXY_ISSUERS_FILE too; one of them must go")
    return faults


def _defines_keys(text: str | None) -> bool:
    """Say whether a key text defines keys, or is faulty, which is told elsewhere."""
    try:
        return text is None or bool(parse_keys(text))
    except ValueError:
        return True


def _sentence(fault: Any) -> str:  # noqa: ANN401  pydantic's ErrorDetails
    return "is required" if fault["type"] == "missing" else str(fault["msg"]).removeprefix("Value error, ")


def _plain(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "not UTF-8 text"


def describe(settings: Settings) -> dict[str, object]:
    """Give every setting's effective value, secrets masked, for people to read."""
    shown: dict[str, object] = {}
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if name == "api_keys":
            value = [key.name for key in value]
        elif name == "issuers_file":
            value = [entry.issuer for entry in value]
        elif isinstance(value, SecretStr):
            value = f"set ({len(value.get_secret_value())} characters)"
        shown[PREFIX + name.upper()] = value
    return shown


def describe_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """Give what `describe` would, as far as it can be told of an environment that has faults."""
    values, _, _ = _gather(environment)
    shown: dict[str, object] = {}
    for name, field in Settings.model_fields.items():
        value: object = values.get(name, None if field.is_required() else field.default)
        if name in SECRETS and name in values:
            value = f"set ({len(values[name])} characters)"
        elif isinstance(value, str) and "@" in value:
            value = "set, with what may be a password"
        shown[PREFIX + name.upper()] = value
    return shown
