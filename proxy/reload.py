"""Reading the settings again (SIGHUP): policies, the file's keys and the log level change, what runs goes on.

All of it or nothing: a setting that is wrong leaves everything as it was, and the log says why.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Final

from proxy.admission import Limits
from proxy.environment import SettingsError, load
from proxy.keycache import KeyCache
from proxy.limitsettings import SIMPLE
from proxy.settings import Settings

log: Final = logging.getLogger("agentflow_proxy.server")
RELOADED: Final = frozenset({"limits", *SIMPLE, "api_keys", "log_level"})


class Reload:
    """Applies what can change while the proxy runs. `set_level` is told the log level."""

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        *,
        limits: Limits,
        keys: KeyCache,
        set_level: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._limits = limits
        self._keys = keys
        self._set_level = set_level

    def __call__(self) -> None:
        """Read the environment's files again, and apply them."""
        try:
            settings = load(self._environment)
        except SettingsError as error:
            fields: dict[str, object] = {"problems": error.problems}
            log.error("settings.reload_refused", extra={"fields": fields})  # noqa: TRY400  the problems say it all
            return
        before, self._settings = self._settings, settings
        self._limits.replace(settings.policies())
        self._keys.pin(settings.api_keys)
        self._set_level(settings.log_level)
        others = [name for name in Settings.model_fields if name not in RELOADED]
        waiting = [f"PROXY_{name.upper()}" for name in others if getattr(before, name) != getattr(settings, name)]
        fields = {"policies": [policy.name for policy in settings.policies().policies], "keys": len(settings.api_keys)}
        log.warning("settings.reloaded", extra={"fields": fields | {"need_a_restart": waiting}})
