"""docs/identity.md as an operator follows it: each command is run, in order, and says what the page says it does."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.agent import start_agent, stop
from tests.support.oidc import run_provider

PAGE = Path(__file__).parents[2] / "docs" / "identity.md"
STEP = re.compile(r"^```sh\n(.*?)^```\n\n^```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARK = "=== step"


def free_port() -> int:
    """Find a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_each_command_of_the_guide_does_what_it_says(tmp_path: Path) -> None:
    """From the provider's URL to a revoked client, and to acting for users, with nothing beside the page."""
    steps = STEP.findall(PAGE.read_text())
    agent = start_agent(tmp_path)
    port = free_port()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "PROXY_AGENT_URL": agent.url,
        "PROXY_AGENT_SECRET": agent.secret,
        "PROXY_PORT": str(port),
    }
    try:
        with run_provider() as provider:

            def here(text: str) -> str:
                return text.replace("https://login.example.com", provider.issuer).replace(":8000", f":{port}")

            # A line is in the log a moment after the answer; who reads the page takes longer than that.
            steps = [
                (re.sub(r"(?m)^(grep .* proxy\.log)$", r"until \1; do read -t 0.05; done", step), text)
                for step, text in steps
            ]
            script = "trap 'kill %1; wait' EXIT\n" + "".join(f"echo '{MARK}'\n{here(step)}\n" for step, _ in steps)
            process = subprocess.Popen(
                ["/usr/bin/env", "bash", "-c", script],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                output = process.communicate(timeout=80)[0].decode()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            told = [here(text).split() for _, text in steps]
    finally:
        stop(agent.process)

    done = [part.split() for part in output.split(MARK)[1:]]
    assert len(steps) == PAGE.read_text().count("```sh") == 7
    assert [words[-len(said) :] for words, said in zip(done, told, strict=True)] == told
