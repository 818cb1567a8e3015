"""What an operator can set: `PROXY_…` variables, each secret also as `…_FILE`; checked whole, at once, at start.

Reads the environment it is given and the files that it names; nothing else, and never later.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

import limits
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from proxy.claims import ClaimNames, ClaimRules
from proxy.issuers import (
    MIN_SECRET_BYTES,
    SHORT_SECRET,
    Issuer,
    IssuerEntry,
    read_issuers,
    read_secrets,
    shared_secret_issuer,
)
from proxy.keys import parse_keys
from proxy.model import Deadlines, StaticKey
from proxy.revocations import read_revocations

PREFIX: Final = "PROXY_"
SECRETS: Final = frozenset({"agent_secret", "jwt_secret", "thread_secret", "api_keys"})

type Seconds = Annotated[float, Field(gt=0, le=86_400)]


class SettingsError(Exception):
    """The environment cannot be served from; `problems` has one sentence for each fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _secret(value: object) -> object:
    if isinstance(value, str) and len(value.encode()) < MIN_SECRET_BYTES:
        raise ValueError(SHORT_SECRET)
    return value


def _secrets(value: object) -> object:
    if isinstance(value, str):
        read_secrets(value)
    return value


def _rate(value: str) -> str:
    if value != "off":
        try:
            limits.parse_many(value)
        except ValueError as error:
            raise ValueError("must be `off` or amounts per window, such as 60/minute or 10/second;1000/day") from error
    return value


type Secret = Annotated[SecretStr, BeforeValidator(_secret)]
type SecretList = Annotated[SecretStr, BeforeValidator(_secrets)]
type Rate = Annotated[str, Field(description="amount/window; off")]


class Settings(BaseModel):
    """Every setting, with its default. A field `name` is the variable `PROXY_NAME`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

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
    jwt_secret: Annotated[
        SecretList | None, Field(description="verifies callers' tokens (HS256); several: one a line, the newest last")
    ] = None
    jwt_issuer: Annotated[str | None, Field(min_length=1, description="the iss every token must have")] = None
    jwt_audience: Annotated[str | None, Field(min_length=1, description="the aud every token must have")] = None
    jwt_leeway_seconds: Annotated[float, Field(ge=0, le=300, description="clock skew forgiven")] = 10
    jwt_max_lifetime_seconds: Annotated[
        float, Field(gt=0, le=1e9, description="longest time from a token's iat, or from now, to its exp")
    ] = 366 * 86_400
    jwt_max_age_seconds: Annotated[
        float | None, Field(gt=0, le=1e9, description="longest time since a token's iat, which it then must have")
    ] = None
    jwt_tenant_claim: Annotated[str, Field(min_length=1, description="the claim that names a tenant")] = "tenant"
    namespace: Annotated[
        Literal["principal", "tenant"], Field(description="whose a token's threads are: its subject's or its tenant's")
    ] = "principal"
    issuers_file: Annotated[
        tuple[IssuerEntry, ...], Field(description="[[issuers]] in TOML: any number of issuers")
    ] = ()
    jwks_refresh_seconds: Annotated[Seconds, Field(description="fetched keys are fetched again after this")] = 600
    jwks_cooldown_seconds: Annotated[Seconds, Field(description="least time between two fetches of an issuer's")] = 10
    jwks_timeout_seconds: Annotated[Seconds, Field(description="for a whole fetch of keys")] = 3
    jwks_stale_seconds: Annotated[
        Annotated[float, Field(gt=0, le=30 * 86_400)],
        Field(description="keys count this long while their issuer cannot be reached"),
    ] = 86_400
    revocations_file: Annotated[Path | None, Field(description="revoked tokens and subjects, as JSON lines")] = None
    api_keys: Annotated[tuple[StaticKey, ...], Field(description="[[keys]] in TOML")] = ()
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
        float, Field(ge=0, le=3600, description="running answers may take this long after SIGTERM")
    ] = 30
    docs: Annotated[bool, Field(description="serve /docs and /openapi.json")] = True
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="least level logged")] = "info"

    @field_validator("agent_url")
    @classmethod
    def _is_origin(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query or "@" in value:
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

    @field_validator("issuers_file", mode="before")
    @classmethod
    def _are_issuers(cls, value: object) -> object:
        return read_issuers(Path(value)) if isinstance(value, str) else value

    @field_validator("revocations_file")
    @classmethod
    def _is_readable(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_revocations(value)
        return value

    @model_validator(mode="after")
    def _someone_can_call(self) -> Self:
        if self.jwt_secret is None and not self.issuers_file and not self.api_keys:
            raise ValueError("nobody could call: set PROXY_JWT_SECRET, PROXY_ISSUERS_FILE or PROXY_API_KEYS_FILE")
        issuers = self.token_issuers()
        secrets = [s.get_secret_value() for s in (self.agent_secret, self.thread_secret) if s is not None]
        secrets += (secret for issuer in issuers for secret in issuer.secrets)
        if len(secrets) != len(set(secrets)):
            raise ValueError(
                "PROXY_AGENT_SECRET, PROXY_JWT_SECRET and PROXY_THREAD_SECRET must differ, issuers' secrets too"
            )
        if len({issuer.rules.issuer for issuer in issuers}) != len(issuers):
            raise ValueError("PROXY_JWT_ISSUER and PROXY_ISSUERS_FILE name the same issuer")
        return self

    def own_issuer(self) -> Issuer | None:
        """Give the issuer of PROXY_JWT_…; None without PROXY_JWT_SECRET."""
        if self.jwt_secret is None:
            return None
        return shared_secret_issuer(read_secrets(self.jwt_secret.get_secret_value()), self._claim_rules())

    def token_issuers(self) -> tuple[Issuer, ...]:
        """Give every issuer whose tokens count."""
        own, rules = self.own_issuer(), self._claim_rules()
        return (*((own,) if own is not None else ()), *(entry.build(rules) for entry in self.issuers_file))

    def _claim_rules(self) -> ClaimRules:
        return ClaimRules(
            issuer=self.jwt_issuer,
            audience=self.jwt_audience,
            names=ClaimNames(tenant=(self.jwt_tenant_claim,)),
            leeway=self.jwt_leeway_seconds,
            max_age=self.jwt_max_age_seconds,
            max_lifetime=self.jwt_max_lifetime_seconds,
            namespace=self.namespace,
        )

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


def load(environment: Mapping[str, str]) -> Settings:
    """Read the settings from `environment`. Raises SettingsError with every problem in it.

    An empty value counts as unset. A `PROXY_` name that is no setting is a problem: it is a misspelling.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or not environment[variable]:
            continue
        if (secret := name.removesuffix("_file")) != name and secret in SECRETS:
            if environment.get(PREFIX + secret.upper()):
                problems.append(f"{variable}: set this or {PREFIX}{secret.upper()}, not both")
                continue
            try:
                values[secret] = Path(environment[variable]).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                problems.append(f"{variable}: cannot be read: {_plain(error)}")
                values[secret] = None
        elif name in Settings.model_fields:
            values[name] = environment[variable]
        else:
            problems.append(f"{variable}: is no setting; see docs/operations.md for the list")
    unread = {name for name, value in values.items() if value is None}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems += [_sentence(fault) for fault in error.errors() if not unread & set(map(str, fault["loc"][:1]))]
    if problems:
        raise SettingsError(problems)
    return settings


def _sentence(fault: Any) -> str:  # noqa: ANN401  pydantic's ErrorDetails
    where = PREFIX + str(fault["loc"][0]).upper() if fault["loc"] else "settings"
    if fault["type"] == "missing":
        return f"{where}: is required"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"


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
