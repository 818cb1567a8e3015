"""What an operator can set about exchanges other than a request and its answer: AG-UI, files, WebSockets.

A part of `settings`, which reads the environment.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

type Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ExchangeSettings(BaseModel):
    """How large, how long, and how many at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    allow_client_tools: Annotated[bool, Field(description="let AG-UI's callers offer the model tools of their own")] = (
        False
    )
    max_upload_bytes: Annotated[
        int, Field(ge=1024, le=1 << 32, description="largest upload, the form around the file included")
    ] = 26 << 20
    upload_timeout_seconds: Annotated[
        Seconds, Field(description="for a whole upload to arrive, and again for the sidecar to answer it")
    ] = 120
    uploads_at_once: Annotated[int, Field(ge=1, le=65_536, description="most uploads that run at once")] = 64
    uploads_per_caller: Annotated[int, Field(ge=1, le=65_536, description="most of them of one caller")] = 16
    websocket_idle_seconds: Annotated[
        Seconds, Field(description="a WebSocket is closed when nothing was said on it for this long")
    ] = 660
    websocket_total_seconds: Annotated[Seconds, Field(description="a WebSocket is closed after this")] = 3600
    websockets_at_once: Annotated[int, Field(ge=1, le=65_536, description="most WebSockets open at once")] = 1024
    websockets_per_caller: Annotated[int, Field(ge=1, le=65_536, description="most of them of one caller")] = 256
