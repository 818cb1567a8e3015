"""What an operator can set about seeing what goes on: logs, metrics and traces.

A part of `settings`, which reads the environment; opens and sends nothing.
"""

from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

_NOT_A_URL: Final = (
    "must be http(s)://host:port, such as http://127.0.0.1:4318, without a name, password, path or query"
)


class TelemetrySettings(BaseModel):
    """How loud, in which form, and where to."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="least level logged")] = "info"
    log_format: Annotated[
        Literal["auto", "json", "text"], Field(description="json; text for people; auto: text on a terminal")
    ] = "auto"
    metrics_host: Annotated[str, Field(description="address to serve /metrics on")] = "127.0.0.1"
    metrics_port: Annotated[
        int | None, Field(ge=0, le=65535, description="port to serve /metrics on; 0: a free one; unset: nowhere")
    ] = None
    otlp_url: Annotated[str | None, Field(description="where traces go (OTLP over HTTP); unset: nothing is traced")] = (
        None
    )
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1, description="share of the requests that are traced")] = 0.1
    trace_follow_caller: Annotated[
        bool, Field(description="trace what the caller's traceparent marks as sampled, and nothing else that has one")
    ] = False

    @field_validator("otlp_url")
    @classmethod
    def _is_collector(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError as error:
            raise ValueError(_NOT_A_URL) from error
        bare = parts.path in ("", "/") and not parts.query and not parts.fragment and "@" not in parts.netloc
        if parts.scheme not in ("http", "https") or not parts.hostname or not bare or not value.isprintable():
            raise ValueError(_NOT_A_URL)
        return value.rstrip("/")
