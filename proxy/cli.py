"""The command `agentflow-proxy`: serve, dev, check, operations, migrate, keys, limits, token.

Speaks to people; decides nothing that a request could meet.
"""

import argparse
import asyncio
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from proxy import audit, keycommands, limitcommands
from proxy.board import Board
from proxy.claims import MAX_SUBJECT_LENGTH
from proxy.credentials import make_key, parse_key
from proxy.environment import SettingsError, describe, describe_environment, load
from proxy.keys import entry_text, parse_keys
from proxy.logs import configure_logging, log_plainly
from proxy.operations import IMPERSONATE, OPERATIONS, SCOPES, USUAL_SCOPES, Kind, Operation
from proxy.policies import Per, Quota, Unit
from proxy.settings import Settings
from proxy.telemetry import Share, listen_for_metrics
from proxy.tokens import issue_token
from proxy.workers import Supervisor

if TYPE_CHECKING:
    from proxy.livecheck import Finding

_LIFETIME = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_SCOPES_HELP = f"separated by commas (all but {IMPERSONATE})"
MOST_WORKERS = 64
_LAST_LINES_SECONDS = 1.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; give its exit status: 0 done, 1 refused, 2 not understood."""
    options = _parser().parse_args(arguments)
    try:
        status = int(options.command(options))
        sys.stdout.flush()
    except SettingsError as error:
        return _refuse(error.problems)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def serve(options: argparse.Namespace) -> int:
    """Serve from the environment alone, until SIGTERM."""
    from proxy.server import listen  # noqa: PLC0415  what serves is half of all there is: other commands start without it

    settings = load(os.environ)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        return _refuse([f"PROXY_HOST, PROXY_PORT: {settings.host}:{settings.port} cannot be used: {error.strerror}"])
    settings = settings.model_copy(update={"workers": options.workers or settings.workers})
    if settings.workers > 1:
        log_plainly(settings.log_level, sys.stdout)
        return _supervise(settings, listener)
    return _serve(settings, listener)


def _supervise(settings: Settings, listener: socket.socket) -> int:
    """Serve with several workers, whose metrics are one."""
    from proxy.server import import_early  # noqa: PLC0415  as above

    try:
        counted = listen_for_metrics(settings) if settings.metrics_port is not None else None
    except OSError as error:
        return _refuse([f"PROXY_METRICS_HOST, PROXY_METRICS_PORT: cannot be used: {error.strerror}"])
    import_early(settings)
    board = Board.create(settings.workers) if counted is not None else None

    def work(place: int, listener: socket.socket, started: Callable[[], None]) -> int:
        share = Share(board, place, counted) if board is not None and counted is not None else None
        return _serve(settings, listener, started, share)

    return Supervisor(settings.workers, listener, work).run()


def _serve(
    settings: Settings,
    listener: socket.socket,
    started: Callable[[], None] | None = None,
    share: Share | None = None,
) -> int:
    from proxy.server import build  # noqa: PLC0415  as above

    handler = configure_logging(settings.log_level, sys.stdout, settings.log_format)  # here: no thread survives a fork
    try:
        server = build(settings, started=started, environment=os.environ, share=share)
    except SettingsError as error:
        return _refuse(error.problems)
    server.run(sockets=[listener])
    handler.writer.flush(_LAST_LINES_SECONDS)
    for each in audit.log.handlers:
        each.flush()
    return 0


def check(options: argparse.Namespace) -> int:
    """Print the settings as they would be, secrets masked; then every problem in them, and of what they name."""
    try:
        settings = load(os.environ)
    except SettingsError as error:
        if options.json:
            _say(json.dumps({"problems": error.problems}))
        else:
            _show(describe_environment(os.environ))
        return _refuse(error.problems)
    if not options.json:
        _show(describe(settings))
    if options.live:
        from proxy.livecheck import examine  # noqa: PLC0415  it knows every client there is; `serve` needs few

        return _tell(asyncio.run(examine(settings)), as_json=options.json)
    if settings.database_url is not None:
        from proxy.server import require_schema  # noqa: PLC0415  as above

        require_schema(settings.database_url.get_secret_value())
    return 0


def _tell(findings: "Sequence[Finding]", *, as_json: bool) -> int:
    """Print what was found; give 1 when something is wrong."""
    if as_json:
        _say(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        width = max(len(finding.dependency) for finding in findings)
        _say("")
        for finding in findings:
            _say(f"{finding.verdict:<8}{finding.dependency:<{width}}  {finding.sentence}")
    return int(any(finding.verdict == "wrong" for finding in findings))


def develop(_: argparse.Namespace) -> int:
    """Run a local agent and the proxy before it."""
    from proxy import dev  # noqa: PLC0415  as above

    return dev.run(os.environ)


def operations(_: argparse.Namespace) -> int:
    """Print the table of what callers can reach, with the limits that the environment sets, or else the usual ones."""
    try:
        settings = load(os.environ)
    except SettingsError:
        settings = Settings.model_construct()
    rows = [("METHOD", "PATH", "SCOPE", "LIMITS")]
    rows += [(row.method, row.path, row.scope, _limits(row, settings)) for row in OPERATIONS]
    path, scope = (max(len(row[column]) for row in rows) for column in (1, 2))
    for row in rows:
        _say(f"{row[0]:<7} {row[1]:<{path}} {row[2]:<{scope}} {row[3]}")
    return 0


def _limits(row: Operation, settings: Settings) -> str:
    """Say what bounds an operation: what it takes of its caller's rate, its body, how long it may last."""
    quotas = settings.policies().plan(row.name).quotas
    rate = ", ".join(_quota_text(quota) for quota in quotas) or "no quota"
    body, seconds = "no body", settings.query_timeout_seconds
    if row.kind in (Kind.RUN, Kind.AG_UI):
        body, seconds = f"{settings.max_body_bytes} bytes", settings.total_timeout_seconds
    elif row.kind is Kind.CONTROL:
        body = f"{settings.max_body_bytes} bytes"
    elif row.kind is Kind.UPLOAD:
        body, seconds = f"{settings.max_upload_bytes} bytes", settings.upload_timeout_seconds
    elif row.kind is Kind.DUPLEX:
        body, seconds = f"{settings.max_body_bytes} bytes a message", settings.websocket_total_seconds
    return f"{rate}, {body}, {seconds:g} s"


def _quota_text(quota: Quota) -> str:
    """Say what an operation takes of a quota, and of whose."""
    whose = "" if quota.per is Per.PRINCIPAL else f" per {quota.per}" if quota.per is Per.TENANT else " over all"
    shadow = " (shadow)" if quota.shadow else ""
    if not quota.window:
        return f"{quota.amount} at once{whose}{shadow}"
    unit = " tokens" if quota.unit is Unit.TOKENS else ""
    taken = f"{quota.cost} of " if quota.cost else ""
    return f"{taken}{quota.amount}{unit} in {quota.window} s{whose}{shadow}"


def new_key(options: argparse.Namespace) -> int:
    """Print a new key, once, and its entry for PROXY_API_KEYS_FILE."""
    key = make_key(secrets.choice)
    parts = parse_key(key)
    assert parts is not None  # noqa: S101  we made it
    entry = entry_text(name=options.name, key_id=parts.id, digest=parts.digest, scopes=options.scopes)
    try:
        parse_keys(entry)
    except ValueError as error:
        return _refuse([str(error)])
    if options.json:
        digest = f"sha256:{parts.id}:{parts.digest}"
        told = {"key": key, "name": options.name, "digest": digest, "scopes": sorted(options.scopes), "entry": entry}
        _say(json.dumps(told))
    else:
        _say(f"{key}\n\n{entry}".rstrip())
    return 0


def token(options: argparse.Namespace) -> int:
    """Print a token that this deployment accepts."""
    settings = load(os.environ)
    issuer = settings.own_issuer()
    if issuer is None:
        return _refuse(["PROXY_JWT_SECRET: is required to sign a token"])
    if not 0 < len(options.subject) <= MAX_SUBJECT_LENGTH or not options.subject.isprintable():
        return _refuse([f"--subject: must be 1 to {MAX_SUBJECT_LENGTH} printable characters"])
    if options.expires > settings.jwt_max_lifetime_seconds:
        return _refuse(["--expires: is more than PROXY_JWT_MAX_LIFETIME_SECONDS; the token would be refused"])
    _say(issue_token(issuer, subject=options.subject, scopes=options.scopes, now=time.time(), lifetime=options.expires))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agentflow-proxy", description="The secure front door of an AgentFlow agent.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("dev", develop, "run a local agent and the proxy before it"),
        ("operations", operations, "print what callers can reach"),
    ):
        commands.add_parser(name, help=text, description=text).set_defaults(command=command)
    text = "serve, configured by PROXY_… variables"
    served = commands.add_parser("serve", help=text, description=text)
    served.add_argument("--workers", type=_count, metavar="N", help="processes behind the one port (PROXY_WORKERS)")
    served.set_defaults(command=serve)
    checked = commands.add_parser("check", help="print the settings and every problem in them")
    checked.add_argument("--live", action="store_true", help="ask every dependency too")
    checked.add_argument("--json", action="store_true", help="for scripts")
    checked.set_defaults(command=check)
    keys = commands.add_parser("keys", help="make, list and end API keys").add_subparsers(
        required=True, metavar="COMMAND"
    )
    made = keys.add_parser("new", help="print a new key and its entry for PROXY_API_KEYS_FILE")
    made.add_argument("--name", required=True)
    made.add_argument("--scopes", type=_scopes, default=USUAL_SCOPES, help=_SCOPES_HELP)
    made.add_argument("--json", action="store_true")
    made.set_defaults(command=new_key)
    keycommands.add_commands(commands, keys, scopes=_scopes, seconds=_seconds)
    limitcommands.add_commands(commands)
    signed = commands.add_parser("token", help="print a JWT signed with PROXY_JWT_SECRET")
    signed.add_argument("--subject", required=True)
    signed.add_argument("--scopes", type=_scopes, default=USUAL_SCOPES, help=_SCOPES_HELP)
    signed.add_argument("--expires", type=_seconds, default=600, metavar="10m", help="s, m, h or d (10m)")
    signed.set_defaults(command=token)
    return parser


def _scopes(text: str) -> frozenset[str]:
    scopes = frozenset(text.replace(",", " ").split())
    if unknown := sorted(scopes - SCOPES):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(SCOPES))}")
    return scopes


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"must be 1 to {MOST_WORKERS}")
    return int(text)


def _seconds(text: str) -> int:
    match = _LIFETIME.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError("must be a number and a unit, such as 10m")
    return int(match[1]) * _UNITS[match[2]]


def _show(settings: Mapping[str, object]) -> None:
    for name, value in settings.items():
        _say(f"{name}={'' if value is None else value}")


def _say(text: str) -> None:
    print(text)


def _refuse(problems: Sequence[str]) -> int:
    print(*problems, sep="\n", file=sys.stderr)
    return 1
