"""An OpenID provider on this machine: it describes itself, publishes keys, signs tokens, and misbehaves when told to.

Its client-credentials endpoint is what a machine client of a real provider would call.
"""

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from tests.support.jose import Signer, claims, make_signer

DESCRIPTION = "/.well-known/openid-configuration"


@dataclass(slots=True)
class Provider:
    """What the server answers with; everything may be changed while it runs."""

    signers: list[Signer] = field(default_factory=lambda: [make_signer("RS256")])
    mode: str = "good"
    port: int = 0
    described_as: str = ""
    keys_at: str = ""
    asked: list[str] = field(default_factory=list)
    let_go: threading.Event = field(default_factory=threading.Event)

    @property
    def issuer(self) -> str:
        """The provider's URL."""
        return f"http://127.0.0.1:{self.port}"

    def token(self, subject: str = "alice", signer: Signer | None = None, **more: object) -> str:
        """Sign a token of the newest key."""
        return (signer or self.signers[-1]).sign(claims(self.issuer, subject=subject, **more))

    def entry(self, **settings: object) -> str:
        """Write the provider's `[[issuers]]` table."""
        told = {"issuer": self.issuer, "audience": "agentflow-proxy"} | settings
        return "[[issuers]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in told.items())

    def document(self, path: str) -> object:
        """Give what is published at a path."""
        if path == DESCRIPTION:
            return {
                "issuer": self.described_as or self.issuer,
                "jwks_uri": self.keys_at or f"{self.issuer}/jwks",
                "token_endpoint": f"{self.issuer}/token",
            }
        return {"keys": [signer.jwk() for signer in self.signers]}


class _Handler(BaseHTTPRequestHandler):
    """Answers in the provider's mode."""

    provider: Provider
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.provider.asked.append(self.path)
        body = json.dumps(self.provider.document(self.path)).encode()
        answers: dict[str, Callable[[], None]] = {
            "good": lambda: self.answer(200, body),
            "hang": lambda: (self.provider.let_go.wait(30), None)[1],
            "drip": lambda: self.drip(body),
            "garbage": lambda: self.answer(200, b"<html>\xff</html>"),
            "a list": lambda: self.answer(200, b"[]"),
            "too deep": lambda: self.answer(200, b"[" * 100_000),
            "no keys": lambda: self.answer(200, b'{"keys":[]}'),
            "broken keys": lambda: self.answer(200, b'{"keys":[{"kty":"RSA","n":"!","e":"AQAB"},7,null]}'),
            "error": lambda: self.answer(500, body),
            "redirect": lambda: self.answer(302, b"", Location=f"{self.provider.issuer}/elsewhere"),
            "huge": lambda: self.answer(200, b'{"keys":[' + b" " * (8 << 20) + b"]}"),
            "endless": self.pour,
            "gzip": lambda: self.answer(200, gzip.compress(body), **{"Content-Encoding": "gzip"}),
            "cut": lambda: self.answer(200, body[:20], length=len(body)),
            "not HTTP": lambda: (self.wfile.write(b"\x00\x01\x02\r\n\r\n"), None)[1],
        }
        answers[self.provider.mode]()
        self.close_connection = True

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        token = self.provider.token(asked["client_id"][0], scope=asked["scope"][0])
        self.answer(200, json.dumps({"access_token": token, "token_type": "Bearer", "expires_in": 600}).encode())

    def answer(self, status: int, body: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for byte in body:
            self.wfile.write(bytes([byte]))
            if self.provider.let_go.wait(0.05):
                return

    def pour(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.provider.let_go.is_set():
            self.wfile.write(b" " * 65536)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # whoever asked has had enough
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  http.server's name
        """Say nothing."""


@contextmanager
def run_provider(**parts: object) -> Iterator[Provider]:
    """Run a provider on a free port."""
    provider = Provider(**parts)  # type: ignore[arg-type]
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"provider": provider}))
    server.daemon_threads = True
    server.block_on_close = False
    provider.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        provider.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()


def eventually(claim: Callable[[], bool], seconds: float = 10) -> float:
    """Wait until `claim` holds; give how long that took, or fail."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if claim():
            return time.monotonic() - started
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")
