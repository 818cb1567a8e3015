"""The proxies a user would write in an afternoon: FastAPI, a JWT dependency, slowapi, and one of three clients.

Favoured where it is a matter of taste: uvloop, httptools, no access log, no limit on connections.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import aiohttp
import httpx
import jwt
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded

from benchmarks.contenders.model import NEVER
from benchmarks.tokens import AUDIENCE, ISSUER, SECRET

LIMIT = f"{os.environ.get('BENCH_LIMIT', NEVER)}/minute"


def _upstream() -> str:
    return f"http://127.0.0.1:{os.environ['BENCH_UPSTREAM']}/v1/graph"


def verify(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    """Verify the caller's token and keep its subject for the limiter."""
    try:
        claims = jwt.decode(
            authorization.removeprefix("Bearer "),
            SECRET,
            algorithms=["HS256"],
            issuer=ISSUER,
            audience=AUDIENCE,
            options={"require": ["exp", "sub"]},
        )
    except jwt.InvalidTokenError as error:
        raise HTTPException(401) from error
    request.state.subject = claims["sub"]


def _subject(request: Request) -> str:
    return str(request.state.subject)


def _app(**more: object) -> tuple[FastAPI, Limiter]:
    limiter = Limiter(key_func=_subject)
    app = FastAPI(dependencies=[Depends(verify)], **more)  # type: ignore[arg-type]
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    return app, limiter


def naive() -> FastAPI:
    """Make a new httpx client for every request."""
    app, limiter = _app()
    upstream = _upstream()

    @app.post("/agent/invoke")
    @limiter.limit(LIMIT)
    async def invoke(request: Request) -> Response:
        async with httpx.AsyncClient(timeout=None) as client:  # noqa: S113  a run may take minutes
            answer = await client.post(f"{upstream}/invoke", content=await request.body(), headers=_headers(request))
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])

    @app.post("/agent/stream")
    @limiter.limit(LIMIT)
    async def stream(request: Request) -> StreamingResponse:
        body = await request.body()

        async def relay() -> AsyncIterator[bytes]:
            async with (
                httpx.AsyncClient(timeout=None) as client,  # noqa: S113  as above
                client.stream("POST", f"{upstream}/stream", content=body, headers=_headers(request)) as answer,
            ):
                async for chunk in answer.aiter_raw():
                    yield chunk

        return StreamingResponse(relay(), media_type="text/event-stream")

    return app


def shared() -> FastAPI:
    """Share one httpx client among all requests."""
    upstream = _upstream()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=None, limits=limits) as client:  # noqa: S113  as above
            app.state.client = client
            yield

    app, limiter = _app(lifespan=lifespan)

    @app.post("/agent/invoke")
    @limiter.limit(LIMIT)
    async def invoke(request: Request) -> Response:
        client: httpx.AsyncClient = request.app.state.client
        answer = await client.post(f"{upstream}/invoke", content=await request.body(), headers=_headers(request))
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])

    @app.post("/agent/stream")
    @limiter.limit(LIMIT)
    async def stream(request: Request) -> StreamingResponse:
        client: httpx.AsyncClient = request.app.state.client
        body = await request.body()

        async def relay() -> AsyncIterator[bytes]:
            async with client.stream("POST", f"{upstream}/stream", content=body, headers=_headers(request)) as answer:
                async for chunk in answer.aiter_raw():
                    yield chunk

        return StreamingResponse(relay(), media_type="text/event-stream")

    return app


def with_aiohttp() -> FastAPI:
    """Share one aiohttp session among all requests."""
    upstream = _upstream()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            app.state.session = session
            yield

    app, limiter = _app(lifespan=lifespan)

    @app.post("/agent/invoke")
    @limiter.limit(LIMIT)
    async def invoke(request: Request) -> Response:
        session: aiohttp.ClientSession = request.app.state.session
        body = await request.body()
        async with session.post(f"{upstream}/invoke", data=body, headers=_headers(request)) as answer:
            return Response(await answer.read(), answer.status, media_type=answer.headers["content-type"])

    @app.post("/agent/stream")
    @limiter.limit(LIMIT)
    async def stream(request: Request) -> StreamingResponse:
        session: aiohttp.ClientSession = request.app.state.session
        body = await request.body()

        async def relay() -> AsyncIterator[bytes]:
            async with session.post(f"{upstream}/stream", data=body, headers=_headers(request)) as answer:
                async for chunk in answer.content.iter_any():
                    yield chunk

        return StreamingResponse(relay(), media_type="text/event-stream")

    return app


def _headers(request: Request) -> dict[str, str]:
    return {"content-type": "application/json", "accept": request.headers.get("accept", "*/*")}
