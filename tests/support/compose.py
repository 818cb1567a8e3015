"""Reads the compose files as the Compose Specification lays one over the other, and a Dockerfile's last words.

It starts nothing.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE = "docker-compose.yml"
SCALE = "docker-compose.scale.yml"
OBSERVE = "docker-compose.observe.yml"
PROVIDER = "docker-compose.provider.yml"
REFERENCE = re.compile(r"\$\{(?P<name>\w+)(?::[-?](?P<default>[^}]*))?\}")
REPLACED = frozenset({"command", "entrypoint", "test"})
"""What the later file says instead; other sequences are joined."""


def read(name: str) -> dict[str, Any]:
    """Read a compose file as it is written, nothing interpolated."""
    value: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return value


def merged(*names: str) -> dict[str, Any]:
    """Read several files, the later laid over the earlier."""
    value: Any = {}
    for name in names:
        value = _over(value, read(name))
    services: dict[str, Any] = value
    return services


def interpolated(text: str, dotenv: Mapping[str, str] = MappingProxyType({})) -> str:
    """Give the text with every variable as .env has it, or at its default."""
    return REFERENCE.sub(lambda match: dotenv.get(match["name"], match["default"] or ""), text)


def environment(service: dict[str, Any]) -> dict[str, str]:
    """Give a service's variables, at their defaults."""
    return {name: interpolated(value) for name, value in service.get("environment", {}).items()}


def command(service: dict[str, Any]) -> list[str]:
    """Give the words of a service's command: its own, or its image's, where that is ours."""
    if "command" in service:
        return list(service["command"])
    if "build" not in service:
        return []
    text = (ROOT / service["build"]["dockerfile"]).read_text()
    words: list[str] = json.loads(re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)[-1])
    return words


def _over(under: Any, over: Any, name: str = "") -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {key: _over(under.get(key), value, key) for key, value in over.items()}
    if isinstance(under, list) and isinstance(over, list) and name not in REPLACED:
        return under + [item for item in over if item not in under]
    return over
