"""What an issuer of callers' tokens is: its URL, audience, algorithms, keys, and where its claims stand.

Reads `[[issuers]]` in TOML and the key files that it names, once, at the start; never fetches anything.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from proxy.claims import ClaimNames, ClaimRules
from proxy.publickeys import PUBLIC, SHARED, VerificationKey, pem_keys, shared_key

MIN_SECRET_BYTES: Final = 32
SHORT_SECRET: Final = f"must have at least {MIN_SECRET_BYTES} bytes; make one with: openssl rand -base64 48"
_WELL_KNOWN: Final = "/.well-known/openid-configuration"
_MOST_SECRETS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """One issuer whose tokens count. Its keys are `keys`, or are fetched from `url`.

    `url` is a key set's, or with `discovers` an OpenID provider's description. `secrets` is set for HS256 alone.
    """

    rules: ClaimRules
    algorithms: frozenset[str]
    keys: tuple[VerificationKey, ...] = ()
    url: str | None = None
    discovers: bool = False
    secrets: tuple[str, ...] = field(default=(), repr=False)


def shared_secret_issuer(secrets: Iterable[str], rules: ClaimRules) -> Issuer:
    """Make an issuer whose tokens are HS256 under one of `secrets`; the last one is the newest."""
    kept = tuple(secrets)
    return Issuer(rules=rules, algorithms=SHARED, keys=tuple(map(shared_key, kept)), secrets=kept)


def read_secrets(text: str) -> tuple[str, ...]:
    """Read secrets, one a line, the newest last. Raises ValueError for a short, repeated or unusable one."""
    secrets = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not all(secret.isprintable() for secret in secrets):
        raise ValueError("must be printable text, a secret a line")
    if any(len(secret.encode()) < MIN_SECRET_BYTES for secret in secrets) or not secrets:
        raise ValueError(SHORT_SECRET)
    if len(set(secrets)) != len(secrets) or len(secrets) > _MOST_SECRETS:
        raise ValueError(f"must be at most {_MOST_SECRETS} secrets, a line each, all different")
    for secret in secrets:
        shared_key(secret)
    return secrets


def fetchable(url: str) -> str:
    """Give `url` back if keys may come from there: https, or http on this machine. Raises ValueError."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    allowed = parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))
    if not allowed or not host or "@" in parts.netloc or parts.fragment or not url.isascii() or not url.isprintable():
        raise ValueError("must be an https URL; http is for this machine's own addresses")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _as_path(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _read(value: object) -> object:
    """Read the file that a setting names; the name is not told, for somebody may have written the secret itself."""
    if not isinstance(value, str):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError("cannot be read: not a name of UTF-8 text") from error


type ClaimPath = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_path), Field(min_length=1, max_length=5)
]
type Text = Annotated[str, BeforeValidator(_read)]
type Bound = Annotated[float, Field(gt=0)]


class ClaimEntry(BaseModel):
    """`[issuers.claims]`: each a claim's name, or a list of names that leads into nested objects."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: ClaimPath = ("sub",)
    scopes: ClaimPath | None = None
    tenant: ClaimPath = ("tenant",)
    tier: ClaimPath = ("tier",)
    rate: ClaimPath | None = None


class IssuerEntry(BaseModel):
    """One `[[issuers]]` table. Where no keys are named, they are discovered from the issuer's URL (OpenID)."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    issuer: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[!-~]+$")]
    audience: Annotated[str, Field(min_length=1, max_length=255)]
    algorithms: frozenset[Literal["HS256", "RS256", "PS256", "ES256", "EdDSA"]] = frozenset()
    jwks_url: str | None = None
    public_key_files: tuple[Text, ...] = ()
    secret_file: Text | None = Field(default=None, repr=False)
    types: frozenset[Literal["", "jwt", "at+jwt"]] = frozenset({"", "jwt", "at+jwt"})
    leeway_seconds: Annotated[float, Field(ge=0, le=300)] | None = None
    max_age_seconds: Bound | None = None
    max_lifetime_seconds: Bound | None = None
    namespace: Literal["principal", "tenant"] | None = None
    claims: ClaimEntry = ClaimEntry()

    @field_validator("jwks_url")
    @classmethod
    def _is_fetchable(cls, value: str | None) -> str | None:
        return fetchable(value) if value is not None else None

    @field_validator("public_key_files")
    @classmethod
    def _hold_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            pem_keys(text, PUBLIC)
        return value

    @field_validator("secret_file")
    @classmethod
    def _holds_secrets(cls, value: str | None) -> str | None:
        if value is not None:
            read_secrets(value)
        return value

    @model_validator(mode="after")
    def _is_one_family(self) -> Self:
        given = [self.jwks_url is not None, bool(self.public_key_files), self.secret_file is not None]
        if sum(given) > 1:
            raise ValueError("has more than one of jwks_url, public_key_files and secret_file")
        family = SHARED if self.secret_file is not None else PUBLIC
        if self.algorithms - family:
            raise ValueError(f"algorithms must be among {', '.join(sorted(family))} with these keys")
        for text in self.public_key_files:
            pem_keys(text, self.algorithms or PUBLIC)
        if not any(given):
            fetchable(self.issuer)
        return self

    def build(self, defaults: ClaimRules) -> Issuer:
        """Make the issuer; what the entry leaves out is as in `defaults`."""
        rules = ClaimRules(
            issuer=self.issuer,
            audience=self.audience,
            types=self.types,
            names=self._names(),
            leeway=defaults.leeway if self.leeway_seconds is None else self.leeway_seconds,
            max_age=self.max_age_seconds or defaults.max_age,
            max_lifetime=self.max_lifetime_seconds or defaults.max_lifetime,
            namespace=self.namespace or defaults.namespace,
        )
        if self.secret_file is not None:
            return shared_secret_issuer(read_secrets(self.secret_file), rules)
        algorithms = frozenset(self.algorithms) or PUBLIC
        keys = tuple(key for text in self.public_key_files for key in pem_keys(text, algorithms))
        discovers = not keys and self.jwks_url is None
        url = self.issuer.rstrip("/") + _WELL_KNOWN if discovers else self.jwks_url
        return Issuer(rules=rules, algorithms=algorithms, keys=keys, url=url, discovers=discovers)

    def _names(self) -> ClaimNames:
        usual = ClaimNames()
        scopes = usual.scopes if self.claims.scopes is None else (self.claims.scopes,)
        return ClaimNames(self.claims.subject, scopes, self.claims.tenant, self.claims.tier, self.claims.rate)


class IssuerFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuers: Annotated[tuple[IssuerEntry, ...], Field(max_length=100)]


def read_issuers(path: Path) -> tuple[IssuerEntry, ...]:
    """Read the issuers of a file. Raises ValueError that names every fault in it at once."""
    try:
        return parse_issuers(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError("cannot be read: not UTF-8 text") from error


def parse_issuers(text: str) -> tuple[IssuerEntry, ...]:
    """Read the issuers of a TOML text. Raises ValueError that names every fault in it at once."""
    try:
        entries = IssuerFile.model_validate(tomllib.loads(text)).issuers
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from error
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ValueError("; ".join(faults)) from error
    if len({entry.issuer for entry in entries}) != len(entries):
        raise ValueError("two issuers share their URL")
    return entries
