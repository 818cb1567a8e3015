"""What a process imports that was asked for nothing but tokens: each worker holds it, and each start waits for it."""

import os
import subprocess
import sys

LEAST = {"PATH": os.defpath, "PROXY_AGENT_SECRET": "a" * 48, "PROXY_JWT_SECRET": "j" * 48}
BUILD = """
import os, sys
from proxy import cli
from proxy.environment import load
from proxy.server import build, import_early
settings = load(os.environ)
import_early(settings)
build(settings, environment=os.environ)
print(*sys.modules)
"""
UNASKED = {
    *("sqlalchemy", "alembic", "aiosqlite", "asyncpg"),  # PROXY_DATABASE_URL
    "redis",  # PROXY_REDIS_URL
    "prometheus_client",  # PROXY_METRICS_PORT
    *("opentelemetry.sdk", "opentelemetry.exporter"),  # PROXY_OTLP_URL; FastAPI imports OpenTelemetry's API itself
    "httpx",  # issuers whose keys are fetched, `check --live` and `dev`
}


def modules(**settings: str) -> set[str]:
    """Give what a serving process has imported that is built from these settings."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD], env=LEAST | settings, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_what_no_setting_asks_for_is_not_imported() -> None:
    """No database, Redis, metrics, traces or fetched keys: none of their libraries."""
    assert not UNASKED & modules()


def test_what_settings_ask_for_is_imported_before_it_is_served_from() -> None:
    """The names above are the libraries' own, and no first request waits for an import."""
    asked = {
        "PROXY_REDIS_URL": "redis://127.0.0.1:1",
        "PROXY_METRICS_PORT": "0",
        "PROXY_OTLP_URL": "http://127.0.0.1:1",
    }
    expected = {"redis", "prometheus_client", "opentelemetry.sdk", "opentelemetry.exporter"}

    assert expected <= UNASKED & modules(**asked)


def test_commands_start_without_what_serves() -> None:
    """Whoever makes a key waits for none of it."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, proxy.cli; print(*sys.modules)"],
        env={"PATH": os.defpath}, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert not {"fastapi", "uvicorn", "websockets", "proxy.server"} & set(done.stdout.split())
