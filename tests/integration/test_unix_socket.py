"""A sidecar that listens on a Unix socket: everything that goes to it goes there, and only who may can connect."""

import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from agent_service.listeners import listen_on
from tests.support.agent import PRODUCTION, Agent, start_agent, stop
from tests.support.principals import Principals
from tests.support.proxy import Proxy, start_proxy, stop_proxy

NOBODY = 65_534


@dataclass(slots=True)
class House:
    """A sidecar that takes no other `Host` than `localhost`, and a proxy before it."""

    path: Path
    agent: Agent
    proxy: Proxy
    token: str

    def client(self) -> httpx.Client:
        """Make a client that has the token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.proxy.url, headers=headers, timeout=20, trust_env=False)


def start_on(path: Path, **environment: str) -> Agent:
    """Start a sidecar that keeps everything beside its socket."""
    uploads = str(path.with_name("uploads"))
    return start_agent(
        path.parent, at=path, launcher=PRODUCTION, ALLOWED_HOST="localhost", MEDIA_STORAGE_PATH=uploads, **environment
    )


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """Run both. The directory's name is short: a socket's path must be."""
    principals = Principals()
    with tempfile.TemporaryDirectory(prefix="unix-") as name:
        path = Path(name) / "agent.sock"
        house = House(path, agent := start_on(path), None, principals.token("alice"))  # type: ignore[arg-type]
        try:
            settings = {**principals.environment(), "PROXY_RATE_LIMIT": "off"}
            house.proxy = start_proxy(path.parent, agent.url, agent.secret, **settings)
            yield house
            stop_proxy(house.proxy.process)
        finally:
            stop(house.agent.process)
        assert not path.exists()  # who is told to end takes its file along


def test_every_kind_of_exchange_goes_over_it(house: House) -> None:
    """Answers, streams, files both ways and WebSockets are what they are over TCP."""
    with house.client() as client:
        invoked = client.post("/agent/invoke", json={"text": "hi"})
        streamed = client.post("/agent/stream", json={"text": "[words 3]"})
        upload = client.post("/agent/v1/files/upload", files={"file": ("a.txt", b"the kettle", "text/plain")})
        kept = client.get(f"/agent/v1/files/{upload.raise_for_status().json()['data']['file_id']}")
    deltas = [line["message"] for line in map(json.loads, streamed.text.splitlines()) if line["message"]["delta"]]
    headers = {"Authorization": f"Bearer {house.token}"}
    url = house.proxy.url.replace("http", "ws", 1) + "/agent/v1/graph/ws"
    with connect(url, additional_headers=headers, proxy=None) as talk:
        talk.send(json.dumps({"text": "hi"}))
        heard = [json.loads(talk.recv(timeout=20)) for _ in range(2)]

    assert invoked.json()["data"]["messages"][-1]["content"][0]["text"] == "You said: hi"
    assert [delta["content"][0]["text"] for delta in deltas] == ["w1 ", "w2 ", "w3 "]
    assert kept.text == "the kettle"
    assert {event["event"] for event in heard} == {"message"}


def test_a_live_check_asks_over_it(house: House) -> None:
    """All that is said of a sidecar at a port is said of this one."""
    variables = {
        "PATH": os.defpath, "PYTHONWARNINGS": "error", "PROXY_AGENT_URL": house.agent.url,
        "PROXY_AGENT_SECRET": house.agent.secret, "PROXY_JWT_SECRET": "j" * 48,
    }  # fmt: skip
    command = [Path(sys.executable).with_name("agentflow-proxy"), "check", "--live", "--json"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["findings"]

    assert done.returncode == 0
    assert [each["verdict"] for each in found] == ["ok"] * 5
    assert house.agent.url in found[0]["sentence"]


def test_only_its_user_and_group_can_connect(house: House) -> None:
    """The mode says so and, where this test may become somebody else, so does the system."""
    assert stat.S_IMODE(house.path.stat().st_mode) == 0o660

    if os.geteuid() == 0:
        house.path.parent.chmod(0o701)  # so that it is the socket that refuses
        attack = f"import socket; socket.socket(socket.AF_UNIX).connect({str(house.path)!r})"
        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", attack], user=NOBODY, group=NOBODY, extra_groups=[],
            env={"PATH": os.defpath}, cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "PermissionError" in done.stderr


def test_nobody_takes_the_place_of_one_who_listens(house: House) -> None:
    """A second server on the same path does not start, and the first goes on."""
    with pytest.raises(OSError, match="in use"):
        listen_on(house.path)
    with house.client() as client:
        assert client.post("/agent/invoke", json={"text": "hi"}).status_code == 200


def test_a_sidecar_that_is_gone_is_502_until_it_is_back(house: House) -> None:
    """Killed, it leaves a file that nobody listens on: the same problem as at a port. The next one takes its place."""
    house.agent.process.send_signal(signal.SIGKILL)
    house.agent.process.wait()
    with house.client() as client:
        deserted = client.post("/agent/invoke", json={"text": "hi"})
        house.path.rename(house.path.with_name("away"))
        missing = client.post("/agent/v1/files/upload", files={"file": ("a.txt", b"x", "text/plain")})
        house.path.with_name("away").rename(house.path)
        house.agent = start_on(house.path, JWT_SECRET_KEY=house.agent.secret)
        again = client.post("/agent/invoke", json={"text": "hi"})

    problems = [(each.status_code, each.json()["code"]) for each in (deserted, missing)]
    assert problems == [(502, "upstream_unreachable")] * 2
    assert {line["reason"] for line in house.proxy.log_lines() if line.get("status") == 502} == {
        "ConnectionRefusedError",
        "FileNotFoundError",
    }
    assert again.status_code == 200


def test_one_server_at_a_time_takes_a_place(tmp_path: Path) -> None:
    """Who comes while another is about to listen waits, and then finds the place taken."""
    place, turn = tmp_path / "s", os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(listen_on, place) for _ in range(2)]
        while open_at(tmp_path) < 3:
            assert not any(one.done() for one in both)
            time.sleep(0.01)
        existed = place.exists()
        os.close(turn)
        faults = [one.exception(20) for one in both]
        listening = [one.result() for one in both if one.exception() is None]

    assert not existed
    assert [type(fault) for fault in faults if fault is not None] == [OSError]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(place))
    for listener in listening:
        listener.close()


def open_at(directory: Path) -> int:
    """Count this process's descriptors of a directory."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            count += descriptor.readlink() == directory
    return count


def test_a_directory_that_somebody_holds_is_told(tmp_path: Path) -> None:
    """Nobody waits for ever for who may only read it."""
    turn = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_SH)
    with pytest.raises(TimeoutError, match="is locked by another process"):
        listen_on(tmp_path / "t", patience=0.05)
    os.close(turn)

    listen_on(tmp_path / "t", patience=0.05).close()
