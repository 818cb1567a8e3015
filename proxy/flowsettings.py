"""The settings of how answers flow: `PROXY_…` variables like all others, in a file of their own."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from proxy.model import FlowRules


class FlowSettings(BaseModel):
    """How streams are written and how runs end."""

    heartbeat_seconds: Annotated[
        float, Field(ge=0, le=3600, description="between comments on a quiet stream of events; 0: none")
    ] = 15
    max_line_bytes: Annotated[
        int, Field(ge=1024, le=64 << 20, description="longest line of a stream that becomes an event")
    ] = 4 << 20
    error_detail: Annotated[
        Literal["safe", "log", "full"],
        Field(description="the sidecar's error lines: a safe form; that and a log line of the rest; or as they are"),
    ] = "safe"
    stop_on_disconnect: Annotated[
        bool, Field(description="ask the sidecar to stop a stream's run too when its client left")
    ] = False
    stop_over_budget: Annotated[bool, Field(description="end a stream whose caller's token budget is spent")] = True

    def flow_rules(self) -> FlowRules:
        """Give what of it the relay needs."""
        return FlowRules(
            self.heartbeat_seconds,
            self.max_line_bytes,
            self.error_detail,
            self.stop_on_disconnect,
            self.stop_over_budget,
        )
