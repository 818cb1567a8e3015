"""What an operator can set about overload: where new work is refused, and whose goes first.

A part of `settings`, which reads the environment.
"""

import math
import re
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from proxy.overload import MOST_TIERS, Thresholds

_TIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class OverloadSettings(BaseModel):
    """How much this process takes on."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    max_loop_lag_seconds: Annotated[
        float | None,
        Field(gt=0, le=60, description="new work gets 503 while the event loop is this late; unset: never"),
    ] = None
    max_open_runs: Annotated[
        int | None,
        Field(ge=1, le=1_000_000, description="new work gets 503 while this many runs are open; unset: never"),
    ] = None
    tiers: Annotated[
        tuple[str, ...],
        Field(
            description="from the lowest to the highest: the lower gets that 503 earlier; a tier not named is lowest"
        ),
    ] = ("default",)

    @field_validator("tiers", mode="before")
    @classmethod
    def _are_tiers(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        names = tuple(name.strip() for name in value.split(","))
        if not all(_TIER.fullmatch(name) for name in names) or len(set(names)) != len(names):
            raise ValueError("must be different names of tiers with commas between, such as bronze,default,gold")
        if len(names) > MOST_TIERS:
            raise ValueError(f"must be at most {MOST_TIERS} tiers")
        return names

    def thresholds(self) -> Thresholds:
        """Give what new work is held to."""
        return Thresholds(self.max_loop_lag_seconds or math.inf, self.max_open_runs or math.inf, self.tiers)
