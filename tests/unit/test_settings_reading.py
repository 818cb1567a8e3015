"""What an operator sets: read whole, refused whole, and shown without its secrets."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.environment import SECRETS, SettingsError, describe, describe_environment, load
from proxy.keys import entry_text
from proxy.model import Deadlines
from proxy.settings import Settings
from proxy.storedkeys import StoredKey

AGENT = "agent-secret-of-enough-bytes-0001"
JWT = "jwt-secret-of-more-than-32-bytes-0002"
THREAD = "thread-secret-of-enough-bytes-000003"
DIGEST = "0123456789abcdef" * 4
KEYS = entry_text(name="ci", key_id="AAAAAAAAAAAA", digest=DIGEST, scopes=["agent:invoke"])
VALUES = {
    "api_keys": KEYS,
    "database_url": "postgresql+asyncpg://proxy@db/keys",
    "redis_url": "rediss://:secret@cache:6380/1",
}
LEAST = {"PROXY_AGENT_SECRET": AGENT, "PROXY_JWT_SECRET": JWT}
SECONDS = ["0", "-1", "86401", "nan", "inf", "soon"]
BAD: dict[str, list[str]] = {
    "max_loop_lag_seconds": ["0", "-1", "61", "nan", "late"],
    "max_open_runs": ["0", "-1", "1.5", "many"],
    "tiers": ["gold,gold", "bronze,,gold", "a b", ",", "a,b,c,d,e,f,g", "-"],
    "port": ["-1", "65536", "http", "80.5"],
    "agent_url": [
        "127.0.0.1:8001",
        "https://agent:8001",
        "http://",
        "http://:8001",
        "http://agent:8001/v1",
        "http://agent:8001//",
        "http://agent:8001?a=b",
        "http://user:pass@agent:8001",
        "http://[::1",
        "http://[:::]:8001",
        "http://[1.2.3.4]:8001",
        "http://agent:65536",
        "unix:/run/agent.sock",
    ],
    "agent_secret": ["short", "s" * 31, "-----BEGIN PUBLIC KEY-----MFkwEwYHKoZIzj0CAQYI-----END PUBLIC KEY-----"],
    "thread_secret": ["short", "s" * 31],
    "jwt_secret": ["short", "é" * 15, f"{JWT}\nshort", f"{JWT}\n{JWT}"],
    "jwt_leeway_seconds": ["-1", "301", "nan", "x"],
    "jwt_max_lifetime_seconds": ["0", "nan", "1e10", "x"],
    "jwt_max_age_seconds": ["0", "nan", "1e10", "x"],
    "drain_delay_seconds": ["-1", "61", "nan", "x"],
    "namespace": ["Tenant", "user"],
    "issuers_file": ["/nowhere", "/", "/dev/null"],
    "jwks_refresh_seconds": SECONDS,
    "jwks_cooldown_seconds": SECONDS,
    "jwks_timeout_seconds": SECONDS,
    "jwks_stale_seconds": ["0", "nan", "1e10", "x"],
    "revocations_file": ["/nowhere", "/"],
    "api_keys": ["x", "[[keys]]", KEYS.replace("agent:invoke", "agent:fix"), KEYS * 2],
    "database_url": [
        "keys.db",
        "sqlite:///keys.db",
        "sqlite+aiosqlite:///:memory:",
        "sqlite+aiosqlite:///",
        "postgres://x",
    ],
    "key_store_grace_seconds": ["4", "86401", "nan", "x"],
    "rate_limit": [
        "1000000000000000/day",
        "60",
        "Off",
        "-1/minute",
        "60/fortnight",
        "60/minute;",
        "off;60/minute",
        "sixty/minute",
    ],
    "rate_strategy": ["leaky", "sliding-window"],
    "concurrency_limit": ["0", "-1", "1000001", "ten", "1.5"],
    "token_limit": ["200000", "0/hour"],
    "limits": ["x", "[[policies]]", '[[policies]]\nname = "a"\nrate = "1/moon"', "[costs]\nfly = 1"],
    "auth_failure_limit": ["20", "20/moon"],
    "redis_url": [
        *("cache:6379", "http://cache", "redis+sentinel://a:1", "redis+cluster://a", "redis+cloud://a:1/x"),
        *("rediss://a?ssl_ca_cert=/ca", "rediss://a?ssl_ca_certs=/nowhere", "rediss://a?ssl_check_hostname=no"),
        *("redis://a?ssl_check_hostname=true", "redis://a?db=x", "redis+cluster://a:1?db=1", "redis://a?protocol=3"),
    ],
    "redis_prefix": ["a b", "{a}", "a:b"],
    "redis_timeout_seconds": ["0", "0.001", "6", "nan"],
    "limits_without_redis": ["open", "Local"],
    "replicas": ["0", "1001", "x"],
    "workers": ["0", "65", "x"],
    "lease_seconds": ["0", "31", "nan"],
    "legacy_rate_headers": ["maybe", "2"],
    "max_body_bytes": ["1023", str((64 << 20) + 1), "1MB"],
    "body_timeout_seconds": SECONDS,
    "allow_system_messages": ["sometimes"],
    "allow_client_tools": ["sometimes"],
    "max_upload_bytes": ["1023", str((1 << 32) + 1), "1MB"],
    "upload_timeout_seconds": SECONDS,
    "uploads_per_caller": ["0", "65537", "x"],
    "websockets_per_caller": ["0", "65537", "x"],
    "uploads_at_once": ["0", "65537", "x"],
    "websocket_idle_seconds": SECONDS,
    "websocket_total_seconds": SECONDS,
    "websockets_at_once": ["0", "65537", "x"],
    "max_recursion_limit": ["0", "101", "x"],
    "default_thread": ["old", "NEW"],
    "connect_timeout_seconds": SECONDS,
    "first_byte_timeout_seconds": SECONDS,
    "idle_timeout_seconds": SECONDS,
    "total_timeout_seconds": SECONDS,
    "query_timeout_seconds": SECONDS,
    "heartbeat_seconds": ["-1", "3601", "x"],
    "max_line_bytes": ["1023", "67108865", "x"],
    "error_detail": ["all", "SAFE"],
    "stop_on_disconnect": ["x", "2"],
    "stop_over_budget": ["x", "2"],
    "pool_connections": ["0", "65537", "x"],
    "pool_idle_connections": ["-1", "65537", "x"],
    "pool_idle_seconds": SECONDS,
    "trusted_hops": ["-1", "17", "x"],
    "grace_seconds": ["-1", "3601", "nan"],
    "docs": ["perhaps"],
    "log_level": ["trace", "INFO"],
    "log_format": ["xml", "JSON"],
    "metrics_port": ["-1", "65536", "x"],
    "otlp_url": [
        "collector:4318",
        "grpc://a:4317",
        "http://",
        "http://u:p@a:1",
        "http://a:4318/v1/traces",
        "http://a:b",
        "http://[::",
    ],
    "trace_sample_ratio": ["-0.1", "1.1", "nan", "x"],
    "trace_follow_caller": ["perhaps"],
}
FREE = {
    "host", "agent_issuer", "agent_audience", "jwt_issuer", "jwt_audience", "jwt_tenant_claim", "audit_file",
    "jwt_rate_claim", "metrics_host",
}  # fmt: skip
"""Settings that any text may be given for."""
CASES = [(f"PROXY_{name.upper()}", value) for name, values in BAD.items() for value in values]


def problems_of(environment: dict[str, str]) -> list[str]:
    """Load what cannot be loaded, and give what is said of it."""
    with pytest.raises(SettingsError) as refused:
        load(environment)
    assert str(refused.value) == "\n".join(refused.value.problems)
    return refused.value.problems


def test_two_secrets_are_enough() -> None:
    """All else has a default, and what is not ours is not read."""
    settings = load(LEAST | {"HOME": "/", "AGENT_SECRET": "x", "proxy_port": "1", "RATELIMIT_ENABLED": "false"})

    secrets = {"agent_secret": AGENT, "jwt_secret": JWT}
    assert settings == Settings.model_validate(secrets)
    assert (settings.host, settings.port, settings.agent_url) == ("127.0.0.1", 8000, "http://127.0.0.1:8001")
    assert (settings.trusted_hops, settings.rate_limit, settings.allow_system_messages) == (0, "60/minute", False)


def test_everything_can_be_set() -> None:
    """Each variable reaches its setting, as what it is."""
    settings = load(
        {
            "PROXY_HOST": "::",
            "PROXY_PORT": "0",
            "PROXY_AGENT_URL": "http://[::1]:9/",
            "PROXY_AGENT_SECRET": AGENT,
            "PROXY_AGENT_ISSUER": "us",
            "PROXY_AGENT_AUDIENCE": "agent",
            "PROXY_THREAD_SECRET": THREAD,
            "PROXY_JWT_SECRET": JWT,
            "PROXY_JWT_ISSUER": "https://issuer.test",
            "PROXY_JWT_AUDIENCE": "proxy",
            "PROXY_JWT_LEEWAY_SECONDS": "0",
            "PROXY_API_KEYS": KEYS,
            "PROXY_RATE_LIMIT": "10/second;1000/day",
            "PROXY_AUTH_FAILURE_LIMIT": "off",
            "PROXY_LEGACY_RATE_HEADERS": "true",
            "PROXY_MAX_BODY_BYTES": "1024",
            "PROXY_DEFAULT_THREAD": "standing",
            "PROXY_TRUSTED_HOPS": "2",
            "PROXY_GRACE_SECONDS": "0",
            "PROXY_DOCS": "no",
            "PROXY_LOG_LEVEL": "error",
        }
    )

    assert (settings.host, settings.port, settings.agent_url) == ("::", 0, "http://[::1]:9")
    assert settings.api_keys == (StoredKey("AAAAAAAAAAAA", "ci", DIGEST, frozenset({"agent:invoke"})),)
    assert settings.thread_secret is not None
    assert settings.thread_secret.get_secret_value() == THREAD
    assert (settings.rate_limit, settings.auth_failure_limit) == ("10/second;1000/day", "off")
    assert (settings.legacy_rate_headers, settings.docs, settings.default_thread) == (True, False, "standing")
    assert (settings.jwt_issuer, settings.jwt_audience, settings.jwt_leeway_seconds) == (
        "https://issuer.test",
        "proxy",
        0,
    )


def test_the_table_of_bad_values_is_whole() -> None:
    """A new setting is given bad values here, or said to have none."""
    assert set(BAD) | FREE == set(Settings.model_fields)
    assert not set(BAD) & FREE


@pytest.mark.parametrize(("variable", "value"), CASES)
def test_a_bad_value_is_named(variable: str, value: str) -> None:
    """One bad value is one sentence, which begins with its variable."""
    problems = problems_of(LEAST | {variable: value})

    assert len(problems) == 1
    assert problems[0].startswith(f"{variable}: ")
    assert len(problems[0]) > len(variable) + 10


def test_every_bad_value_is_named_at_once() -> None:
    """One start tells everything that has to be put right."""
    environment = {f"PROXY_{name.upper()}": values[0] for name, values in BAD.items()}

    problems = problems_of(environment | {"PROXY_PROT": "1", "PROXY_JWT_SECRETS": "x"})

    named = {problem.split(":")[0] for problem in problems}
    assert named == {*environment, "PROXY_PROT", "PROXY_JWT_SECRETS"}
    assert len(problems) == len(named)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"PROXY_JWT_SECRET": ""}, "nobody could call"),
        ({"PROXY_JWT_SECRET": "", "PROXY_API_KEYS": "keys = []"}, "nobody could call"),
        ({"PROXY_JWT_SECRET": AGENT}, "must differ"),
        ({"PROXY_THREAD_SECRET": JWT}, "must differ"),
        ({"PROXY_THREAD_SECRET": AGENT}, "must differ"),
        ({"PROXY_LIMITS": "policies = []", "PROXY_RATE_LIMIT": "1/day"}, "PROXY_LIMITS is instead of PROXY_RATE_LIMIT"),
        ({"PROXY_JWKS_STALE_SECONDS": "60"}, "STALE_SECONDS must be at least PROXY_JWKS_REFRESH_SECONDS (600)"),
        ({"PROXY_JWKS_REFRESH_SECONDS": "5"}, "COOLDOWN_SECONDS must be at most PROXY_JWKS_REFRESH_SECONDS (5)"),
        ({"PROXY_JWKS_COOLDOWN_SECONDS": "601"}, "(600), or that one at least 601"),
        ({"PROXY_JWKS_REFRESH_SECONDS": "300", "PROXY_JWKS_STALE_SECONDS": "200"}, "(300), or that one at most 200"),
    ],
)
def test_what_does_not_go_together_is_named(bad: dict[str, str], sentence: str) -> None:
    """Somebody must be able to call, and no two keys may be one."""
    problems = problems_of(LEAST | bad)

    assert len(problems) == 1
    assert sentence in problems[0]


def test_what_does_not_go_together_is_named_beside_bad_values() -> None:
    """A fault between two settings waits for no other to be put right first."""
    problems = problems_of({"PROXY_AGENT_SECRET": AGENT, "PROXY_PORT": "http"})

    assert [problem for problem in problems if problem.startswith("PROXY_PORT")]
    assert [problem for problem in problems if "nobody could call" in problem]


def test_every_fault_of_fetching_is_named_at_once() -> None:
    """Two contradictions are two sentences; what a setting that is no number contradicts is not known."""
    fetching = {
        "PROXY_JWKS_REFRESH_SECONDS": "50",
        "PROXY_JWKS_STALE_SECONDS": "40",
        "PROXY_JWKS_COOLDOWN_SECONDS": "60",
    }

    told = problems_of(LEAST | fetching | {"PROXY_PORT": "http"})
    unknown = problems_of(LEAST | fetching | {"PROXY_JWKS_REFRESH_SECONDS": "soon"})

    assert [problem.partition(":")[0] for problem in told] == ["PROXY_PORT", "settings", "settings"]
    assert [problem.partition(":")[0] for problem in unknown] == ["PROXY_JWKS_REFRESH_SECONDS"]


def test_settings_of_fetching_may_be_alike() -> None:
    """Keys may end when they are due, and a fetch may be due when the pause is over."""
    same = {f"PROXY_JWKS_{name}_SECONDS": "60" for name in ("REFRESH", "STALE", "COOLDOWN")}

    assert load(LEAST | same).jwks_stale_seconds == 60


def test_nothing_at_all_names_the_one_requirement() -> None:
    """An empty environment lacks the agent's secret."""
    problems = problems_of({})

    assert "PROXY_AGENT_SECRET: is required" in problems


def test_keys_alone_are_enough_to_be_called() -> None:
    """Either kind of credential makes a proxy that someone can call."""
    settings = load({"PROXY_AGENT_SECRET": AGENT, "PROXY_API_KEYS": KEYS})

    assert settings.jwt_secret is None
    assert [key.name for key in settings.api_keys] == ["ci"]


@pytest.mark.parametrize(
    "variable", ["PROXY_PROT", "PROXY_", "PROXY_HOST_FILE", "PROXY_PORT_FILE", "PROXY_FILE", "PROXY_AGENT"]
)
def test_an_unknown_name_is_a_misspelling(variable: str) -> None:
    """A name of ours that is no setting would silently do nothing; it is refused, also for what has no `_FILE`."""
    problems = problems_of(LEAST | {variable: "1"})

    assert len(problems) == 1
    assert problems[0].startswith(f"{variable}: is no setting")


@pytest.mark.parametrize("name", sorted(set(Settings.model_fields) - {"agent_secret", "jwt_secret"}))
def test_an_empty_value_is_unset(name: str) -> None:
    """A variable that is there and empty leaves the default."""
    settings = load(LEAST | {f"PROXY_{name.upper()}": ""})

    assert getattr(settings, name) == Settings.model_fields[name].default


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_may_be_in_a_file(name: str, tmp_path: Path) -> None:
    """Each secret is read from the file that is named, without the line end that files have."""
    value = VALUES.get(name, THREAD)
    (tmp_path / "secret").write_text(f"\n{value}\n")
    variable = f"PROXY_{name.upper()}"

    environment = {k: v for k, v in LEAST.items() if k != variable} | {f"{variable}_FILE": str(tmp_path / "secret")}

    expected = {k: v for k, v in LEAST.items() if k != variable} | {variable: value}
    assert load(environment) == load(expected)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_is_given_once(name: str, tmp_path: Path) -> None:
    """By value and by file at the same time is refused: nobody could tell which counts."""
    (tmp_path / "secret").write_text(THREAD)
    variable = f"PROXY_{name.upper()}"
    value = VALUES.get(name) or LEAST.get(variable, THREAD)

    problems = problems_of(LEAST | {variable: value, f"{variable}_FILE": str(tmp_path / "secret")})

    assert problems == [f"{variable}_FILE: set this or {variable}, not both"]


def test_an_empty_variable_leaves_the_file() -> None:
    """What is empty is unset, beside a file too; and an empty name of a file is no file."""
    settings = load(LEAST | {"PROXY_AGENT_SECRET_FILE": "", "PROXY_API_KEYS_FILE": ""})

    assert settings.agent_secret.get_secret_value() == AGENT


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_file_that_cannot_be_read_is_one_problem(name: str, tmp_path: Path) -> None:
    """What is missing, a directory or no text is told once, by its variable, with nothing that follows from it."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 20)
    variable = f"PROXY_{name.upper()}"
    environment = {k: v for k, v in LEAST.items() if k != variable}

    problems = [
        problems_of(environment | {f"{variable}_FILE": str(path)})
        for path in (tmp_path / "none", tmp_path, tmp_path / "binary")
    ]

    assert problems == [
        [f"{variable}_FILE: cannot be read: No such file or directory"],
        [f"{variable}_FILE: cannot be read: Is a directory"],
        [f"{variable}_FILE: cannot be read: not UTF-8 text"],
    ]


@pytest.mark.parametrize("name", ["agent_secret", "jwt_secret", "thread_secret"])
def test_an_empty_file_is_a_short_secret(name: str, tmp_path: Path) -> None:
    """A file that was never filled does not count as unset."""
    (tmp_path / "secret").write_text("\n")
    variable = f"PROXY_{name.upper()}"
    environment = {k: v for k, v in LEAST.items() if k != variable}

    problems = problems_of(environment | {f"{variable}_FILE": str(tmp_path / "secret")})

    assert len(problems) == 1
    assert problems[0].startswith(f"{variable}_FILE: must have at least 32 bytes")


@pytest.mark.parametrize("value", ["s" * 32, "é" * 16])
def test_a_secret_is_measured_in_bytes(value: str) -> None:
    """32 bytes are enough, however many characters they are."""
    settings = load(LEAST | {"PROXY_JWT_SECRET": value})

    assert settings.jwt_secret is not None
    assert settings.jwt_secret.get_secret_value() == value


@pytest.mark.parametrize(
    "url",
    [
        "http://agent:99999",
        "http://agent:port",
        "http://agent:8001#x",
        "http://agent:8001?",
        "http://a b:1",
        "http://agent:-1",
    ],
)
def test_an_address_that_could_not_be_called_is_refused(url: str) -> None:
    """A sidecar's address is a host and a port, or the start is refused here rather than fail later."""
    problems = problems_of(LEAST | {"PROXY_AGENT_URL": url})

    assert problems == ["PROXY_AGENT_URL: must be http://host:port, without a path"]


MEANT = "http+unix:///run/agent.sock"


@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("http+unix://%2Frun%2Fagent.sock", MEANT),
        ("http+unix://%2frun%2fagent.sock/", MEANT),
        ("http+unix:///run%2Fagent.sock", MEANT),
        ("http+unix://run/agent.sock", MEANT),
        ("http+unix:/run/agent.sock", MEANT),
        ("http+unix:///run/agent.sock/", MEANT),
        ("unix:/run/agent.sock", MEANT),
        ("unix:///run/agent.sock", MEANT),
        ("http+unix://", "http+unix:///path/of/the/socket"),
        ("http+unix:///run/agent.sock?x", "http+unix:///path/of/the/socket"),
        ("http+unix:///run/a b", "http+unix:///path/of/the/socket"),
        ("http+unix:///run/a%00b", "http+unix:///path/of/the/socket"),
    ],
)
def test_one_spelling_of_a_unix_socket_is_read_and_the_others_are_told_it(url: str, right: str) -> None:
    """The path stands as it is behind three slashes; whoever wrote it another way can paste what is right."""
    assert load(LEAST | {"PROXY_AGENT_URL": MEANT}).agent_url == MEANT
    assert problems_of(LEAST | {"PROXY_AGENT_URL": url}) == [f"PROXY_AGENT_URL: must be {right}, the path as it is"]


def test_a_socket_whose_path_is_too_long_is_refused_at_start() -> None:
    """The system has room for 107 bytes, of which a letter may take several."""
    longest = f"http+unix:///{'é' * 53}"

    assert load(LEAST | {"PROXY_AGENT_URL": longest}).agent_url == longest
    assert problems_of(LEAST | {"PROXY_AGENT_URL": f"{longest}x"}) == [
        "PROXY_AGENT_URL: the path of a socket has at most 107 bytes"
    ]


@pytest.mark.parametrize("rate", ["0/minute", "60/minute;0/day"])
@pytest.mark.parametrize("variable", ["PROXY_RATE_LIMIT", "PROXY_AUTH_FAILURE_LIMIT"])
def test_a_rate_of_nothing_is_refused(variable: str, rate: str) -> None:
    """An amount of none would lock everyone out, and is no amount."""
    problems = problems_of(LEAST | {variable: rate})

    assert len(problems) == 1
    assert problems[0].startswith(f"{variable}: must be")


def test_two_spellings_of_one_setting_are_refused() -> None:
    """A name in another case is a misspelling: else the value that counts would be chosen by the alphabet."""
    problems = problems_of(LEAST | {"PROXY_Port": "1", "PROXY_PORT": "2"})

    assert [problem.split(":")[0] for problem in problems] == ["PROXY_Port"]


@pytest.mark.parametrize(
    "variable", ["PROXY_AGENT_SECRET", "PROXY_JWT_SECRET", "PROXY_THREAD_SECRET", "PROXY_API_KEYS"]
)
def test_a_secret_of_no_text_is_named(variable: str) -> None:
    """Bytes that are no UTF-8 come out of the environment as surrogates; they are one problem like any other."""
    problems = problems_of(LEAST | {variable: b"\xff".decode("utf-8", "surrogateescape") * 40})

    assert [problem.split(":")[0] for problem in problems] == [variable]


@given(
    st.dictionaries(
        st.sampled_from([f"PROXY_{name.upper()}" for name in Settings.model_fields] + ["PROXY_X", "PATH"]),
        st.text(max_size=40)
        | st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
        | st.sampled_from(["1", "off", "true", AGENT, JWT, KEYS, "60/minute", "http://a:1"]),
        max_size=6,
    )
)
def test_any_environment_is_settings_or_problems(environment: dict[str, str]) -> None:
    """No values fail in another way, and problems are sentences about variables that were set or missing."""
    try:
        settings = load(LEAST | environment)
    except SettingsError as error:
        problems = error.problems
    else:
        problems = ["settings: none"]
        assert settings.jwt_secret is not None or settings.api_keys

    assert problems
    assert all(problem.startswith(("PROXY_", "settings: ")) for problem in problems)


@given(
    st.sampled_from(sorted(SECRETS)),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=8, max_size=29),
)
def test_a_refused_secret_is_not_told(name: str, value: str) -> None:
    """A secret that is wrong is still a secret: no problem repeats it."""
    problems = problems_of(LEAST | {f"PROXY_{name.upper()}": f"<{value}>"})

    assert f"<{value}>" not in str(problems)


def test_settings_are_shown_without_their_secrets() -> None:
    """Every setting is shown by its variable; of a secret its length, of the keys their names."""
    settings = load(LEAST | {"PROXY_THREAD_SECRET": THREAD, "PROXY_API_KEYS": KEYS, "PROXY_PORT": "9"})

    shown = describe(settings)

    assert set(shown) == {f"PROXY_{name.upper()}" for name in Settings.model_fields}
    assert shown["PROXY_AGENT_SECRET"] == "set (33 characters)"
    assert shown["PROXY_JWT_SECRET"] == "set (37 characters)"
    assert shown["PROXY_THREAD_SECRET"] == "set (36 characters)"
    assert shown["PROXY_API_KEYS"] == ["ci"]
    assert shown["PROXY_PORT"] == 9
    assert shown["PROXY_JWT_ISSUER"] is None
    for secret in (AGENT, JWT, THREAD, DIGEST):
        assert secret not in f"{shown}"


def test_faulty_settings_are_shown_without_their_secrets(tmp_path: Path) -> None:
    """What can be told of an environment with faults is told, its secrets masked, those in files too."""
    (tmp_path / "secret").write_text(JWT + "\n")
    environment = {
        "PROXY_AGENT_SECRET": "short",
        "PROXY_JWT_SECRET_FILE": str(tmp_path / "secret"),
        "PROXY_API_KEYS": KEYS,
        "PROXY_PORT": "http",
        "PROXY_PROT": "1",
    }

    shown = describe_environment(environment)

    assert set(shown) == {f"PROXY_{name.upper()}" for name in Settings.model_fields}
    assert shown["PROXY_AGENT_SECRET"] == "set (5 characters)"
    assert shown["PROXY_JWT_SECRET"] == "set (37 characters)"
    assert shown["PROXY_API_KEYS"] == f"set ({len(KEYS)} characters)"
    assert shown["PROXY_THREAD_SECRET"] is None
    assert (shown["PROXY_PORT"], shown["PROXY_HOST"]) == ("http", "127.0.0.1")
    assert describe_environment({})["PROXY_AGENT_SECRET"] is None
    for secret in ("short", JWT, DIGEST):
        assert secret not in f"{shown}"


def test_settings_that_are_printed_tell_no_secret() -> None:
    """Nor does the value itself, when it ends up in a log or a trace."""
    settings = load(LEAST | {"PROXY_THREAD_SECRET": THREAD})

    for secret in (AGENT, JWT, THREAD):
        assert secret not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"


def test_settings_do_not_change() -> None:
    """They are read once, at the start."""
    settings = load(LEAST)

    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_deadlines_are_those_of_the_settings() -> None:
    """A run has four deadlines of its own; whatever else is asked has one for all, connecting included."""
    settings = load(
        LEAST
        | {
            "PROXY_CONNECT_TIMEOUT_SECONDS": "2",
            "PROXY_FIRST_BYTE_TIMEOUT_SECONDS": "20",
            "PROXY_IDLE_TIMEOUT_SECONDS": "30",
            "PROXY_TOTAL_TIMEOUT_SECONDS": "40",
            "PROXY_QUERY_TIMEOUT_SECONDS": "5",
        }
    )
    hasty = load(LEAST | {"PROXY_CONNECT_TIMEOUT_SECONDS": "9", "PROXY_QUERY_TIMEOUT_SECONDS": "5"})

    assert settings.run_deadlines() == Deadlines(connect=2, first_byte=20, idle=30, total=40)
    assert settings.query_deadlines() == Deadlines(connect=2, first_byte=5, idle=5, total=5)
    assert hasty.query_deadlines() == Deadlines(connect=5, first_byte=5, idle=5, total=5)
