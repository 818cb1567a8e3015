"""What an operator can set about callers' tokens: `PROXY_JWT_…`, `PROXY_ISSUERS_FILE` and what bounds both.

A part of `settings`, which reads the environment; reads only the files that its values name.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator

from proxy.claims import ClaimNames, ClaimRules
from proxy.issuers import Issuer, IssuerEntry, read_issuers, read_secrets, shared_secret_issuer
from proxy.revocations import read_revocations

type Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _secrets(value: object) -> object:
    if isinstance(value, str):
        read_secrets(value)
    return value


type SecretList = Annotated[SecretStr, BeforeValidator(_secrets)]


class TokenSettings(BaseModel):
    """Whose tokens count, and for how long."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

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
    jwt_rate_claim: Annotated[
        str | None, Field(min_length=1, description="the claim that holds a caller's own rate; unset: none does")
    ] = None
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
            names=ClaimNames(
                tenant=(self.jwt_tenant_claim,), rate=(self.jwt_rate_claim,) if self.jwt_rate_claim else None
            ),
            leeway=self.jwt_leeway_seconds,
            max_age=self.jwt_max_age_seconds,
            max_lifetime=self.jwt_max_lifetime_seconds,
            namespace=self.namespace,
        )


def readable_issuers(path: str | None) -> list[Issuer]:
    """Give the issuers of a file; none of one that is faulty, which is told elsewhere."""
    try:
        return [entry.build(ClaimRules()) for entry in read_issuers(Path(path))] if path is not None else []
    except ValueError:
        return []
