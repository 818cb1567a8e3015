"""LiteLLM's custom authentication: verifies the token and gives the caller a limit that never refuses.

Loaded by LiteLLM's proxy by name; its own JWT authentication needs a licence.
"""

import os

import jwt
from fastapi import HTTPException, Request
from litellm.proxy._types import UserAPIKeyAuth

from benchmarks.contenders.model import NEVER
from benchmarks.tokens import AUDIENCE, ISSUER, SECRET

LIMIT = int(os.environ.get("BENCH_LIMIT", NEVER))


async def verify(request: Request, api_key: str) -> UserAPIKeyAuth:  # noqa: ARG001  LiteLLM's signature
    """Verify the caller's token; LiteLLM turns an exception into a refusal."""
    try:
        claims = jwt.decode(
            api_key.removeprefix("Bearer "),
            SECRET,
            algorithms=["HS256"],
            issuer=ISSUER,
            audience=AUDIENCE,
            options={"require": ["exp", "sub"]},
        )
    except jwt.InvalidTokenError as error:
        raise HTTPException(401) from error
    subject = str(claims["sub"])
    return UserAPIKeyAuth(api_key=subject, user_id=subject, rpm_limit=LIMIT)
