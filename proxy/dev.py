"""`agentflow-proxy dev`: a real agent and the proxy before it, on this machine, with credentials to try.

For development only; its secrets stay in `.dev/`, which is nobody else's to read.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import httpx

from proxy.credentials import make_key, parse_key
from proxy.environment import PREFIX, SettingsError, load
from proxy.keys import entry_text
from proxy.logs import configure_logging
from proxy.operations import USUAL_SCOPES
from proxy.server import build, listen
from proxy.settings import Settings
from proxy.tokens import issue_token

DIRECTORY: Final = Path(".dev")
HOST: Final = "127.0.0.1"
JWT_LIFETIME: Final = 3600
ISSUER: Final = "https://dev.agentflow-proxy.invalid"
AUDIENCE: Final = "agentflow-proxy"
INTERNAL_ISSUER: Final = "agentflow-proxy"
INTERNAL_AUDIENCE: Final = "agentflow"
AGENT_START_SECONDS: Final = 60
AGENT_CONFIG: Final = Path(__file__).resolve().parent.parent / "agent_service" / "agentflow.json"


@dataclass(frozen=True, slots=True)
class DevSecrets:
    """What is made on first use and kept for the next."""

    agent_secret: str
    thread_secret: str
    jwt_secret: str
    api_key: str


def run(environment: Mapping[str, str]) -> int:
    """Run both until Ctrl-C or SIGTERM; give the exit status."""
    try:
        port, agent_port = _port(environment, "PORT", 8000), _port(environment, "AGENT_PORT", 8001)
        _make_private(DIRECTORY)
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    kept = _keep_secrets(DIRECTORY / "secrets.json")
    try:
        listener = listen(HOST, port)
    except OSError as error:
        return _refuse(f"port {port} of {HOST} cannot be used ({error.strerror}); choose another: make dev PORT=0")
    try:
        agent_port = _free_port(agent_port)
    except OSError as error:
        return _refuse(
            f"AGENT_PORT {agent_port} cannot be used ({error.strerror}); choose another: make dev AGENT_PORT=0"
        )
    base_url, agent_url = f"http://{HOST}:{listener.getsockname()[1]}", f"http://{HOST}:{agent_port}"
    try:
        settings = load(_proxy_environment(environment, kept, agent_url))
    except SettingsError as error:
        return _refuse(*error.problems)
    for number in (signal.SIGTERM, signal.SIGHUP):  # until the server has its own, and for the terminal's closing
        signal.signal(number, _leave)
    with _agent(environment, kept, agent_port) as agent:
        if not _wait_for(f"{agent_url}/ping", agent):
            return _refuse(f"the agent did not start; see {DIRECTORY}/agent.log", *_tail(DIRECTORY / "agent.log"))
        return _serve(settings, listener, agent, base_url=base_url, agent_url=agent_url, kept=kept)


def _serve(
    settings: Settings,
    listener: socket.socket,
    agent: subprocess.Popen[bytes],
    *,
    base_url: str,
    agent_url: str,
    kept: DevSecrets,
) -> int:
    issuer = settings.own_issuer()
    assert issuer is not None  # noqa: S101  its secret is among ours
    token = issue_token(issuer, subject="dev-user", scopes=USUAL_SCOPES, now=time.time(), lifetime=JWT_LIFETIME)
    credentials = {
        "base_url": base_url,
        "agent_url": agent_url,
        "api_key": kept.api_key,
        "jwt": token,
        "jwt_secret": kept.jwt_secret,
        "issuer": settings.jwt_issuer,
        "audience": settings.jwt_audience,
    }
    _write_private(DIRECTORY / "credentials.json", json.dumps(credentials, indent=2) + "\n")
    configure_logging(settings.log_level, sys.stderr, settings.log_format)
    server = build(settings, started=lambda: print(_greeting(base_url, kept.api_key, token), flush=True))
    died = threading.Event()

    def watch() -> None:
        agent.wait()
        if not server.should_exit:
            died.set()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listener])
    return _refuse("the agent stopped", *_tail(DIRECTORY / "agent.log")) if died.is_set() else 0


def _greeting(base_url: str, api_key: str, token: str) -> str:
    body = "-H 'Content-Type: application/json' -d"
    stream = '{"text": "[words 20] [pace 100ms]", "thread_id": "demo"}'
    return f"""\
URL      {base_url}
API key  {api_key}
JWT      {token}

Invoke, as a machine client:
  curl -s {base_url}/agent/invoke -H 'X-API-Key: {api_key}' {body} '{{"text": "hi", "thread_id": "demo"}}'

Stream, as a signed-in user:
  curl -sN {base_url}/agent/stream -H 'Authorization: Bearer {token}' {body} '{stream}'

Be refused, as anybody else:
  curl -si {base_url}/agent/invoke {body} '{{"text": "hi"}}'

The API: {base_url}/docs. Ctrl-C stops both.
"""


def _proxy_environment(environment: Mapping[str, str], kept: DevSecrets, agent_url: str) -> dict[str, str]:
    """Give the proxy's settings: ours, unless the caller set them."""
    parts = parse_key(kept.api_key)
    assert parts is not None  # noqa: S101  we made it
    ours = {
        "PROXY_API_KEYS": entry_text(name="dev", key_id=parts.id, digest=parts.digest, scopes=USUAL_SCOPES),
        "PROXY_JWT_ISSUER": ISSUER,
        "PROXY_JWT_AUDIENCE": AUDIENCE,
        "PROXY_GRACE_SECONDS": "1",
    }
    fixed = {
        "PROXY_AGENT_URL": agent_url,
        "PROXY_AGENT_SECRET": kept.agent_secret,
        "PROXY_AGENT_ISSUER": INTERNAL_ISSUER,
        "PROXY_AGENT_AUDIENCE": INTERNAL_AUDIENCE,
        "PROXY_THREAD_SECRET": kept.thread_secret,
        "PROXY_JWT_SECRET": kept.jwt_secret,
    }
    ruled = {f"{name}_FILE" for name in fixed} | {"PROXY_API_KEYS", "PROXY_API_KEYS_FILE"}
    theirs = {name: value for name, value in environment.items() if name.startswith(PREFIX) and name not in ruled}
    return ours | theirs | fixed


@contextlib.contextmanager
def _agent(environment: Mapping[str, str], kept: DevSecrets, port: int) -> Generator[subprocess.Popen[bytes]]:
    """Run the agent in a process of its own; stop it at the end."""
    own = {
        "JWT_SECRET_KEY": kept.agent_secret,
        "JWT_ALGORITHM": "HS256",
        "JWT_ISSUER": INTERNAL_ISSUER,
        "JWT_AUDIENCE": INTERNAL_AUDIENCE,
        "AGENT_DATABASE": str((DIRECTORY / "threads.sqlite").resolve()),
    }
    inherited = {name: value for name, value in environment.items() if not name.startswith(PREFIX)}
    command: list[str | Path] = [
        Path(sys.executable).with_name("agentflow"),
        "api",
        "--no-reload",
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    with _open_private(DIRECTORY / "agent.log") as log:
        process = subprocess.Popen(  # noqa: S603  our own command
            [*command, "--config", AGENT_CONFIG],
            env=inherited | own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def _leave(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + AGENT_START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url, timeout=1, trust_env=False).is_success
        time.sleep(0.05)
    return False


def _keep_secrets(path: Path) -> DevSecrets:
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = DevSecrets(**json.loads(path.read_text()))
        if parse_key(kept.api_key) is not None:
            return kept
    agent, thread, jwt = (secrets.token_urlsafe(48) for _ in range(3))
    kept = DevSecrets(agent, thread, jwt, api_key=make_key(secrets.choice))
    _write_private(path, json.dumps({name: getattr(kept, name) for name in DevSecrets.__slots__}) + "\n")
    return kept


def _make_private(directory: Path) -> None:
    """Make the directory ours alone, or find that it is. Raises OSError for a link, or for somebody else's.

    What is in it that leads elsewhere is taken out: it would be written to in our name.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise OSError(f"{directory} cannot be used ({error.strerror}); take it away, or run: make clean") from error
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(f"{directory} cannot be used: it is somebody else's")
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    for path in directory.iterdir():
        if path.is_symlink():
            path.unlink()


def _write_private(path: Path, text: str) -> None:
    with _open_private(path) as file:
        file.write(text.encode())


def _open_private(path: Path) -> BinaryIO:
    """Open an empty file that only we can read. Raises OSError for a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "wb")


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) > 65_535:  # noqa: PLR2004  the last port
        raise ValueError(f"{name} must be a port, 0 to 65535")
    return int(text)


def _free_port(wanted: int) -> int:
    """Give `wanted`, or any for 0, if nobody listens there: a stranger must not be taken for the agent."""
    with socket.create_server((HOST, wanted)) as probe:
        return int(probe.getsockname()[1])


def _tail(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-12:]


def _refuse(*sentences: str) -> int:
    print(*sentences, sep="\n", file=sys.stderr)
    return 1
