"""FastAPI proxies of three makes, from the naive one to the one with aiohttp.

Each is one uvicorn worker; the code is in `python_apps`.
"""

import sys
from functools import partial

from benchmarks.contenders.model import ROOT, Contender, Launch, Place, find_version, plain_environment


def _prepare(factory: str, client: str, place: Place) -> Launch:
    version = find_version("fastapi", "uvicorn", "slowapi", client)
    command = (sys.executable, "-m", "uvicorn", f"benchmarks.contenders.python_apps:{factory}", "--factory")
    flags = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")
    return Launch(
        version=version,
        commands=((*command, *flags, "--port", str(place.port)),),
        environment=plain_environment(
            BENCH_UPSTREAM=str(place.upstream), BENCH_LIMIT=str(place.per_minute), PYTHONPATH=str(ROOT)
        ),
        invoke="/agent/invoke",
        stream="/agent/stream",
    )


NAIVE = Contender(
    "fastapi-naive",
    "FastAPI, a client per request",
    "PyJWT dependency, slowapi, httpx.AsyncClient() in every request, StreamingResponse",
    partial(_prepare, "naive", "httpx"),
)
SHARED = Contender(
    "fastapi-httpx",
    "FastAPI, one shared httpx client",
    "PyJWT dependency, slowapi, one httpx client, StreamingResponse",
    partial(_prepare, "shared", "httpx"),
)
AIOHTTP = Contender(
    "fastapi-aiohttp",
    "FastAPI, aiohttp client",
    "PyJWT dependency, slowapi, one aiohttp session, StreamingResponse",
    partial(_prepare, "with_aiohttp", "aiohttp"),
)
