"""Reading the settings: `PROXY_…` variables, each secret also as `…_FILE`; checked whole, at once, at start.

Reads the environment it is given and the files that it names; nothing else, and never later.
"""

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr, ValidationError

from proxy.issuers import MIN_SECRET_BYTES
from proxy.keys import parse_keys
from proxy.limitsettings import SIMPLE, parse_policies
from proxy.settings import DATABASE_FORMS, KeySettings, Settings
from proxy.tokensettings import readable_issuers

PREFIX: Final = "PROXY_"
SECRETS: Final = frozenset({"agent_secret", "jwt_secret", "thread_secret", "api_keys", "database_url", "redis_url"})
TEXTS: Final = SECRETS | {"limits", "log_level"}
"""Settings that may stand in a file: what is secret, and what can change while the proxy runs."""


class SettingsError(Exception):
    """The environment cannot be served from; `problems` has one sentence for each fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load(environment: Mapping[str, str]) -> Settings:
    """Read the settings from `environment`. Raises SettingsError with every problem in it.

    An empty value counts as unset. A `PROXY_` name that is no setting is a problem: it is a misspelling.
    """
    values, variables, problems = _gather(environment)
    unread = {name for name in variables if name not in values}
    settings, faulty = None, set[str]()
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            faulty.add(name)
            if name not in unread:
                problems.append(f"{variables.get(name, PREFIX + name.upper())}: {_sentence(fault)}")
    problems += _faults_between(values, set(variables)) + _faults_of_fetching(values, faulty)
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
        faults = [
            f"{PREFIX}{str(fault['loc'][0]).upper()}: {_sentence(fault)}"
            + (f", as {DATABASE_FORMS}" if fault["type"] == "missing" else "")  # nothing else is required
            for fault in error.errors()
        ]
        raise SettingsError(problems or faults) from error


def _gather(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Give the value of each setting, the variable that set it, and what could not be read."""
    values: dict[str, str] = {}
    variables: dict[str, str] = {}
    problems: list[str] = []
    for variable in sorted(name for name, value in environment.items() if name.startswith(PREFIX) and value):
        name = variable.removeprefix(PREFIX).lower()
        secret = name.removesuffix("_file")
        if variable != variable.upper() or (name not in Settings.model_fields and secret not in TEXTS):
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
    if _defines_policies(values.get("limits")) and (both := sorted(given & set(SIMPLE))):
        faults.append(f"settings: PROXY_LIMITS is instead of {', '.join(PREFIX + name.upper() for name in both)}")
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


def _faults_of_fetching(values: Mapping[str, str], faulty: AbstractSet[str]) -> list[str]:
    """Find what contradicts itself in how fetched keys are kept; of what is `faulty` in itself nothing is said."""

    def seconds(name: str) -> float:
        return math.nan if name in faulty else float(values.get(name, Settings.model_fields[name].default))

    refresh, cooldown, stale = map(seconds, ("jwks_refresh_seconds", "jwks_cooldown_seconds", "jwks_stale_seconds"))
    faults = []
    if stale < refresh:
        faults.append(
            "settings: keys would end before they are fetched again: PROXY_JWKS_STALE_SECONDS must be at least "
            f"PROXY_JWKS_REFRESH_SECONDS ({refresh:g}), or that one at most {stale:g}"
        )
    if cooldown > refresh:
        faults.append(
            "settings: keys could not be fetched when they are due: PROXY_JWKS_COOLDOWN_SECONDS must be at most "
            f"PROXY_JWKS_REFRESH_SECONDS ({refresh:g}), or that one at least {cooldown:g}"
        )
    return faults


def _defines_keys(text: str | None) -> bool:
    """Say whether a key text defines keys, or is faulty, which is told elsewhere."""
    try:
        return text is None or bool(parse_keys(text))
    except ValueError:
        return True


def _defines_policies(text: str | None) -> bool:
    """Say whether a text defines policies; not if it is faulty, which is told elsewhere."""
    try:
        return text is not None and parse_policies(text) is not None
    except ValueError:
        return False


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
        elif name == "limits" and settings.limits is not None:
            value = [policy.name for policy in settings.limits.policies]
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
        elif name == "limits" and value is not None:
            value = "set"
        elif isinstance(value, str) and "@" in value:
            value = "set, with what may be a password"
        shown[PREFIX + name.upper()] = value
    return shown
