"""Makes the HS256 tokens that callers present, and the bodies that they send.

Knows the benchmark's secrets, which are no secrets; verifies nothing.
"""

import base64
import hashlib
import hmac
import json
import time
from typing import Final

SECRET: Final = "benchmark-secret-of-callers-0123456789abcdef"
AGENT_SECRET: Final = "benchmark-secret-of-the-sidecar-0123456789"
WRONG_SECRET: Final = "benchmark-secret-that-nobody-trusts-01234567"
ISSUER: Final = "https://issuer.test"
AUDIENCE: Final = "agentflow-proxy"
CALLERS: Final = 16


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def make_token(subject: str, *, secret: str = SECRET, seconds: int = 86_400, **claims: str) -> str:
    """Sign a token that expires in `seconds`; `claims` add to or replace the usual ones."""
    now = int(time.time())
    payload = {"sub": subject, "iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + seconds}
    payload |= {"scope": "agent:invoke agent:stream"} | claims
    parts = [_encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, payload)]
    signed = ".".join(parts)
    signature = hmac.digest(secret.encode(), signed.encode(), hashlib.sha256)
    return f"{signed}.{_encode(signature)}"


def make_tokens(count: int = CALLERS) -> list[str]:
    """Sign one good token for each of `count` callers."""
    return [make_token(f"caller-{number}") for number in range(count)]


def forged_tokens(count: int = 64) -> list[str]:
    """Sign tokens with a secret that nobody trusts."""
    return [make_token(f"caller-{number}", secret=WRONG_SECRET) for number in range(count)]


def bad_tokens() -> list[str]:
    """Make a forged, an expired, a foreign and a misdirected token."""
    return [
        *forged_tokens(1),
        make_token("caller-0", seconds=-3600),
        make_token("caller-0", iss="https://other.test"),
        make_token("caller-0", aud="other"),
    ]


def make_jwks() -> str:
    """Give the callers' secret as a JWK set, for proxies that read keys that way."""
    return json.dumps({"keys": [{"kty": "oct", "alg": "HS256", "use": "sig", "k": _encode(SECRET.encode())}]})


def make_body(text: str = "hi", thread: str = "t-1") -> bytes:
    """Write AgentFlow's request; the stub obeys `[words N] [pace Nms]` inside `text`."""
    content = [{"type": "text", "text": text}]
    message = {"messages": [{"role": "user", "content": content}], "config": {"thread_id": thread}}
    return json.dumps(message).encode()


def make_request(path: str, token: str, body: bytes) -> bytes:
    """Write a whole HTTP/1.1 request that accepts newline-delimited JSON."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        "Content-Type: application/json\r\nAccept: application/x-ndjson, application/json\r\n"
        f"User-Agent: bench\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
