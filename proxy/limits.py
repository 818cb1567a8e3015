"""slowapi's limiter, whose notation and strategies are ours, with counts that are bounded in memory (ADR 9).

Decides nothing by itself: `localtier` asks it.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, override

from slowapi import Limiter

from proxy.windows import BoundedMemoryStorage


class QuietLimiter(Limiter):
    """slowapi's limiter, with what it is given and nothing else: not what `.env` or RATELIMIT_… would add.

    `clock` gives Unix seconds.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the null file is not a file is the point of it
            super().__init__(
                key_func=lambda: "",
                storage_uri="bounded-memory://",
                storage_options={"clock": clock},  # type: ignore[dict-item] # it passes on what it is given
                strategy="sliding-window-counter",
                config_filename=os.devnull,
            )

    @property
    def storage(self) -> BoundedMemoryStorage:
        """The counts."""
        storage = self.limiter.storage
        assert isinstance(storage, BoundedMemoryStorage)  # noqa: S101  chosen by its URI above
        return storage

    @override
    def get_app_config(self, key: str, default_value: Any = None) -> Any:
        return default_value
