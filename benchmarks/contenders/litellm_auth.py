"""LiteLLM's custom authentication: verifies the token and gives the caller a limit that never refuses.

Loaded by LiteLLM's proxy by name; its own JWT authentication needs a licence.
"""

import jwt
from fastapi import Request
from litellm.proxy._types import UserAPIKeyAuth

from benchmarks.tokens import AUDIENCE, ISSUER, SECRET


async def verify(request: Request, api_key: str) -> UserAPIKeyAuth:  # noqa: ARG001, RUF029  LiteLLM's signature
    """Verify the caller's token; LiteLLM turns an exception into a refusal."""
    claims = jwt.decode(
        api_key.removeprefix("Bearer "),
        SECRET,
        algorithms=["HS256"],
        issuer=ISSUER,
        audience=AUDIENCE,
        options={"require": ["exp", "sub"]},
    )
    subject = str(claims["sub"])
    return UserAPIKeyAuth(api_key=subject, user_id=subject, rpm_limit=1_000_000_000)
