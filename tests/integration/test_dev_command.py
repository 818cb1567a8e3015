"""The command as people and scripts use it: `dev` with what it prints, `check`, `token` and `keys new`.

Everything runs as a process in a directory of its own, with nothing of this environment but PATH and HOME.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import jwt
import pytest

from proxy.cli import main
from tests.support.agent import ask
from tests.support.principals import Principals
from tests.support.programs import require
from tests.support.proxy import start_proxy, stop_proxy

COMMAND = Path(sys.executable).with_name("agentflow-proxy")
DEADLINE = 75.0
SECRET = "the secret of the agent behind, 32+"


@dataclass(frozen=True, slots=True)
class Dev:
    """A running `agentflow-proxy dev`, and what it has printed when it was ready."""

    process: subprocess.Popen[bytes]
    directory: Path
    printed: str

    def credentials(self) -> dict[str, str]:
        """Read the file it leaves for scripts."""
        credentials: dict[str, str] = json.loads((self.directory / ".dev" / "credentials.json").read_text())
        return credentials

    def curl_lines(self) -> list[str]:
        """Give the lines to paste."""
        return [line.strip() for line in self.printed.splitlines() if line.lstrip().startswith("curl ")]

    def end(self, number: signal.Signals) -> int:
        """Send a signal as a terminal or a supervisor would, and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(timeout=20)


def environment_in(directory: Path, **more: str) -> dict[str, str]:
    """Give PATH, HOME and these."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(directory), **more}


@contextmanager
def dev(directory: Path, **environment: str) -> Iterator[Dev]:
    """Run `dev` on free ports until it says that it is ready; end it if the test has not."""
    output = directory / f"printed-{time.monotonic_ns()}"
    with output.open("wb") as stdout, output.with_suffix(".err").open("wb") as stderr:
        process = subprocess.Popen(
            [COMMAND, "dev"],
            cwd=directory,
            env=environment_in(directory, PORT="0", AGENT_PORT="0", **environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while "Ctrl-C" not in output.read_text():
            assert process.poll() is None, output.with_suffix(".err").read_text()
            assert time.monotonic() < deadline, "not ready"
            time.sleep(0.02)
        yield Dev(process, directory, output.read_text())
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=20)


def run(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=directory,
        env=environment_in(directory, **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def paste(line: str, directory: Path) -> str:
    """Run a line in a shell, as pasted."""
    shell = shutil.which("bash") or "sh"
    pasted = subprocess.run(
        [shell, "-c", line], env=environment_in(directory), capture_output=True, timeout=30, check=True
    )
    return pasted.stdout.decode()


def is_answering(url: str) -> bool:
    """Say whether anything listens there."""
    try:
        httpx.get(url, timeout=5, trust_env=False)
    except httpx.ConnectError:
        return False
    return True


# dev


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """One `dev` for whatever only looks and calls."""
    with dev(tmp_path_factory.mktemp("dev")) as started:
        yield started


def test_it_prints_what_is_needed_in_order(running: Dev) -> None:
    """URL, API key, JWT, then three curl lines: the values that the file holds, and nothing before them."""
    credentials = running.credentials()
    expected = [credentials["base_url"], credentials["api_key"], credentials["jwt"], "curl ", "curl ", "curl "]

    position = 0
    for words in expected:
        position = running.printed.index(words, position) + 1

    assert running.printed.startswith("URL")
    assert len(running.curl_lines()) == 3


def test_the_lines_work_when_pasted(running: Dev) -> None:
    """A machine invokes, a person streams, and anybody else is refused."""
    require("curl", package="curl")
    invoke, stream, refusal = running.curl_lines()
    status = " -w '\\n%{http_code}'"

    invoked, _, invoke_status = paste(invoke + status, running.directory).rpartition("\n")
    streamed, _, stream_status = paste(stream + status, running.directory).rpartition("\n")
    refused = paste(refusal, running.directory)

    assert (invoke_status, stream_status) == ("200", "200")
    assert json.loads(invoked)["data"]["messages"][-1]["content"][0]["text"] == "You said: hi"
    deltas = [json.loads(line)["message"] for line in streamed.splitlines()]
    assert [delta["content"][0]["text"] for delta in deltas if delta["delta"]] == [f"w{n} " for n in range(1, 21)]
    assert refused.startswith("HTTP/1.1 401 ")
    assert 'www-authenticate: Bearer realm="agent"' in refused.lower().replace("bearer", "Bearer")


def test_the_file_for_scripts_is_private_and_complete(running: Dev) -> None:
    """Exactly the promised keys, for its owner's eyes alone."""
    directory, path = running.directory / ".dev", running.directory / ".dev" / "credentials.json"

    keys = set(running.credentials())

    assert keys == {"base_url", "agent_url", "api_key", "jwt", "jwt_secret", "issuer", "audience"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    private = (directory, directory / "secrets.json", directory / "agent.log", directory / "threads.sqlite")
    assert {stat.S_IMODE(file.stat().st_mode) & 0o077 for file in private} == {0}


def test_a_script_can_sign_its_own_tokens(running: Dev) -> None:
    """With `jwt_secret`, `issuer` and `audience` of the file, for any user."""
    credentials = running.credentials()
    claims = {"sub": "script", "iss": credentials["issuer"], "aud": credentials["audience"], "scope": "agent:ping"}
    token = jwt.encode(claims | {"exp": int(time.time()) + 60}, credentials["jwt_secret"], "HS256")

    answer = httpx.get(
        f"{credentials['base_url']}/agent/ping", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )

    assert answer.status_code == 200


def test_the_token_is_short_lived(running: Dev) -> None:
    """What is printed on a terminal is worth nothing tomorrow."""
    claims = jwt.decode(running.credentials()["jwt"], options={"verify_signature": False})

    assert 0 < claims["exp"] - claims["iat"] <= 3600


@pytest.mark.parametrize("presented", ["nothing", "api_key", "jwt"])
def test_the_agent_takes_no_direct_call(running: Dev, presented: str) -> None:
    """Neither without a credential nor with a caller's own: only the proxy has the internal secret."""
    credentials = running.credentials()
    fields = {
        "nothing": {},
        "api_key": {"X-API-Key": credentials["api_key"]},
        "jwt": {"Authorization": f"Bearer {credentials['jwt']}"},
    }[presented]

    answer = httpx.post(f"{credentials['agent_url']}/v1/graph/invoke", json=ask("hi"), headers=fields, trust_env=False)

    assert answer.status_code == 401


def test_only_this_machine_is_listened_to(running: Dev) -> None:
    """Both addresses are the loopback's, on ports that the system chose."""
    urls = [running.credentials()[name] for name in ("base_url", "agent_url")]

    assert all(re.fullmatch(r"http://127\.0\.0\.1:\d+", url) for url in urls)
    assert urls[0] != urls[1]


def test_the_secrets_of_one_directory_are_not_anothers(running: Dev) -> None:
    """What is printed for people holds no secret that signs."""
    kept = json.loads((running.directory / ".dev" / "secrets.json").read_text())

    signing = [kept[name] for name in ("agent_secret", "thread_secret", "jwt_secret")]

    assert len(set(signing)) == 3
    assert not [secret for secret in signing if secret in running.printed]


def test_an_interrupt_ends_both_and_secrets_are_kept(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM end with status 0 and leave nothing running; the next start knows the same callers."""
    with dev(tmp_path) as first:
        before = first.credentials()
        httpx.post(
            f"{before['base_url']}/agent/invoke",
            json={"text": "the kettle is blue", "thread_id": "kept"},
            headers={"X-API-Key": before["api_key"]},
            trust_env=False,
        ).raise_for_status()
        interrupted = first.end(signal.SIGINT)
        left = [url for name, url in before.items() if name.endswith("_url") and is_answering(url)]
    with dev(tmp_path) as second:
        after = second.credentials()
        recalled = httpx.post(
            f"{after['base_url']}/agent/invoke",
            json={"text": "[recall]", "thread_id": "kept"},
            headers={"X-API-Key": before["api_key"]},
            trust_env=False,
        )
        terminated = second.end(signal.SIGTERM)
        left += [url for name, url in after.items() if name.endswith("_url") and is_answering(url)]

    assert (interrupted, terminated, left) == (0, 0, [])
    assert {name for name in before if before[name] != after[name]} <= {"base_url", "agent_url", "jwt"}
    assert recalled.json()["data"]["messages"][-1]["content"][0]["text"] == "the kettle is blue"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"PORT": "http"}, "PORT must be a port"),
        ({"AGENT_PORT": "70000"}, "AGENT_PORT must be a port"),
        ({"PROXY_RATE_LIMT": "1/minute", "PORT": "0"}, "PROXY_RATE_LIMT: is no setting"),
    ],
)
def test_a_doubtful_environment_stops_dev(tmp_path: Path, environment: dict[str, str], sentence: str) -> None:
    """One sentence, no traceback, status 1."""
    ended = run(tmp_path, "dev", **environment)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_is_in_the_way_gets_none_of_its_secrets(tmp_path: Path) -> None:
    """A directory that is a link is refused; links within it are taken out, and its mode is set right."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (elsewhere / "mine").write_text("untouched")
    linked, laid = tmp_path / "linked", tmp_path / "laid"
    for directory in (linked, laid):
        directory.mkdir()
    (linked / ".dev").symlink_to(elsewhere)
    (laid / ".dev").mkdir(mode=0o755)
    for name in ("secrets.json", "agent.log"):
        (laid / ".dev" / name).symlink_to(elsewhere / "mine")

    refused = run(linked, "dev", PORT="0", AGENT_PORT="0")
    run(laid, "dev", PORT="0", AGENT_PORT="0", AGENT_MODEL="parrot")

    assert refused.returncode == 1
    assert ".dev cannot be used" in refused.stderr
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]
    assert (elsewhere / "mine").read_text() == "untouched"
    assert stat.S_IMODE((laid / ".dev").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.lstat().st_mode) for path in (laid / ".dev").iterdir() if path.is_file()} == {0o600}


def test_an_agent_that_cannot_start_is_told_of(tmp_path: Path) -> None:
    """What the agent says is wrong is repeated, and nothing is left running."""
    ended = run(tmp_path, "dev", PORT="0", AGENT_PORT="0", AGENT_MODEL="parrot")

    assert ended.returncode == 1
    assert "AGENT_MODEL is 'parrot'" in ended.stderr


# check


def settings_of(principals: Principals, **more: str) -> dict[str, str]:
    """Give an environment that can be served from."""
    return {"PROXY_AGENT_SECRET": SECRET, **principals.environment(), **more}


def test_check_prints_everything_masked(tmp_path: Path) -> None:
    """Every setting with its effective value, and of each secret no more than that it is set."""
    principals = Principals()
    key = principals.key("billing")

    ended = run(tmp_path, "check", **settings_of(principals, PROXY_RATE_LIMIT="7/minute"))

    printed = ended.stdout + ended.stderr
    assert ended.returncode == 0
    for line in ("PROXY_RATE_LIMIT=7/minute", "PROXY_PORT=8000", f"PROXY_JWT_ISSUER={principals.issuer}"):
        assert line in ended.stdout.splitlines()
    assert re.search(r"^PROXY_JWT_SECRET=set \(\d+ characters\)$", ended.stdout, re.MULTILINE)
    assert "billing" in ended.stdout
    digest = principals.entries[0].partition('digest = "')[2].partition('"')[0].rpartition(":")[2]
    assert not [secret for secret in (SECRET, principals.jwt_secret, key, digest) if secret in printed]


def test_check_tells_every_problem_at_once(tmp_path: Path) -> None:
    """A sentence for each fault, status 1, and still no secret's value."""
    faults = {
        "PROXY_AGENT_SECRET": "hunter2",
        "PROXY_JWT_SECRET": "short-and-secret",
        "PROXY_AGENT_URL": "https://agent/path",
        "PROXY_PORT": "http",
        "PROXY_RATE_LIMIT": "many",
        "PROXY_LOG_LEVEL": "loud",
        "PROXY_API_KEYS_FILE": str(tmp_path / "absent.toml"),
        "PROXY_RATE_LIMT": "60/minute",
    }

    ended = run(tmp_path, "check", **faults)

    told = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert not [name for name in faults if not re.search(rf"^{name}: ", told, re.MULTILINE)]
    assert not [secret for secret in ("hunter2", "short-and-secret", "Traceback") if secret in told]


@pytest.mark.parametrize(
    ("environment", "sentences"),
    [
        ({"PROXY_PORT": "http"}, ["PROXY_PORT: ", "nobody could call"]),
        ({"PROXY_PORT": "http", "PROXY_JWT_SECRET": SECRET}, ["PROXY_PORT: ", "must differ"]),
        ({"PROXY_AGENT_URL": "http://agent:99999", "PROXY_JWT_SECRET": SECRET[::-1]}, ["PROXY_AGENT_URL: "]),
    ],
)
def test_check_overlooks_nothing_that_serve_would_stumble_over(
    tmp_path: Path, environment: dict[str, str], sentences: list[str]
) -> None:
    """Faults between settings are told beside faults within one, and what would fail later is told now."""
    ended = run(tmp_path, "check", PROXY_AGENT_SECRET=SECRET, **environment)

    told = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert not [sentence for sentence in sentences if sentence not in told]


def test_serve_refuses_what_check_refuses(tmp_path: Path) -> None:
    """Nothing is served from half a configuration."""
    ended = run(tmp_path, "serve", PROXY_AGENT_SECRET=SECRET)

    assert ended.returncode == 1
    assert "nobody could call" in ended.stderr


# token, keys new


def test_made_credentials_work_with_serve(tmp_path: Path) -> None:
    """A token and a key from the command are let in by a proxy of the same settings, each with its scopes only."""
    made = json.loads(run(tmp_path, "keys", "new", "--name", "ci", "--scopes", "agent:ping", "--json").stdout)
    keys = tmp_path / "keys.toml"
    keys.write_text(made["entry"])
    settings = Principals().environment() | {"PROXY_API_KEYS": "", "PROXY_API_KEYS_FILE": str(keys)}
    signed = run(tmp_path, "token", "--subject", "ann", "--scopes", "agent:ping", PROXY_AGENT_SECRET=SECRET, **settings)

    proxy = start_proxy(tmp_path, "http://127.0.0.1:9", SECRET, **settings)
    try:
        credentials = {"X-API-Key": made["key"]}, {"Authorization": f"Bearer {signed.stdout.strip()}"}
        statuses = [
            httpx.get(proxy.url + path, headers=credential, trust_env=False).status_code
            for credential in credentials
            for path in ("/agent/ping", "/agent/v1/threads")
        ]
    finally:
        stop_proxy(proxy.process)

    assert made.keys() == {"key", "name", "digest", "scopes", "entry"}
    assert (made["name"], made["scopes"]) == ("ci", ["agent:ping"])
    assert made["key"] not in keys.read_text()
    assert statuses == [502, 403, 502, 403]


def test_a_token_lives_as_long_as_it_says(tmp_path: Path) -> None:
    """Ten minutes unless told otherwise."""
    settings = settings_of(Principals())
    lifetimes = []
    for more in ((), ("--expires", "2h")):
        ended = run(tmp_path, "token", "--subject", "ann", *more, **settings)
        claims = jwt.decode(ended.stdout.strip(), options={"verify_signature": False})
        lifetimes.append(claims["exp"] - claims["iat"])

    assert lifetimes == [600, 7200]


def test_a_key_for_people_is_printed_with_its_entry(tmp_path: Path) -> None:
    """The key once, on a line of its own; then the table to paste into the file."""
    ended = run(tmp_path, "keys", "new", "--name", "ci")

    key, _, entry = ended.stdout.partition("\n\n")
    assert re.fullmatch(r"afp_[0-9A-Za-z]{12}_[0-9A-Za-z]{33}", key)
    assert entry.startswith('[[keys]]\nname = "ci"\ndigest = "sha256:')
    assert key not in entry


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "new", "--name", 'x"\nscopes = []'),
        ("token", "--subject", ""),
        ("token", "--subject", "a" * 256),
    ],
)
def test_what_makes_no_credential_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A name or a subject that would not work is told now, not at the door."""
    ended = run(tmp_path, *arguments, **settings_of(Principals()))

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "new", "--name", "ci", "--scopes", "agent:everything"),
        ("keys", "new"),
        ("token", "--subject", "ann", "--expires", "soon"),
        ("token", "--subject", "ann", "--expires", "0s"),
        ("token",),
        ("fly",),
        (),
    ],
)
def test_what_is_not_understood_is_told(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, how to use it, and nothing on stdout for a script to take for a credential."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert told.err.startswith("usage: agentflow-proxy")
