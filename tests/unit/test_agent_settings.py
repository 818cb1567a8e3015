"""What the agent reads from its environment, and what it refuses to start with."""

from pathlib import Path

import pytest

from agent_service.checkpoints import open_checkpointer
from agent_service.settings import (
    Memory,
    PostgresWithRedis,
    Settings,
    SettingsError,
    SqliteFile,
    read_settings,
    read_storage,
)

TOKENS = {"JWT_SECRET_KEY": "s" * 32, "JWT_ALGORITHM": "HS256"}


def test_defaults_need_nothing_but_the_token_settings() -> None:
    """The local model and a SQLite file are what one gets without asking."""
    settings = read_settings({**TOKENS, "AGENT_MODEL": "", "AGENT_DATABASE": " "})

    assert settings == Settings(model="local", base_url=None, storage=SqliteFile(Path(".agentflow/threads.sqlite")))


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"JWT_SECRET_KEY": ""}, "JWT_SECRET_KEY must be at least 32 bytes"),
        ({"JWT_SECRET_KEY": "s" * 31}, "JWT_SECRET_KEY must be at least 32 bytes"),
        ({"JWT_ALGORITHM": "none"}, "JWT_ALGORITHM must be HS256."),
        ({"AGENT_MODEL": "gpt-4o"}, "AGENT_MODEL is 'gpt-4o'; it must be 'local' or 'openai/<model>'."),
        ({"AGENT_MODEL": "openai/"}, "AGENT_MODEL is 'openai/'"),
        ({"AGENT_MODEL": "google/gemini"}, "it must be 'local' or 'openai/<model>'."),
        ({"AGENT_MODEL": "openai/gpt-4o"}, "OPENAI_API_KEY is missing"),
        ({"AGENT_POSTGRES_DSN": "postgresql://db"}, "AGENT_REDIS_URL is missing"),
        ({"AGENT_REDIS_URL": "redis://cache"}, "AGENT_POSTGRES_DSN is missing"),
    ],
)
def test_a_fault_is_named(environment: dict[str, str], sentence: str) -> None:
    """Each fault has a sentence that names the variable."""
    with pytest.raises(SettingsError) as refused:
        read_settings({**TOKENS, **environment})

    assert sentence in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_all_faults_are_named_at_once() -> None:
    """One start tells everything that has to be put right."""
    with pytest.raises(SettingsError) as refused:
        read_settings({"AGENT_MODEL": "?", "AGENT_REDIS_URL": "redis://cache"})

    assert len(str(refused.value).splitlines()) == 4


def test_secrets_stay_out_of_the_repr() -> None:
    """Settings may be printed: addresses with passwords are not in them."""
    settings = read_settings(
        {**TOKENS, "AGENT_POSTGRES_DSN": "postgresql://u:hush@db", "AGENT_REDIS_URL": "redis://:hush@cache"}
    )

    assert isinstance(settings.storage, PostgresWithRedis)
    assert "hush" not in repr(settings)


def test_storage_is_read_without_the_other_secrets() -> None:
    """The one who sets up the database needs no token secret."""
    storage = read_storage({"AGENT_DATABASE": "/data/threads.sqlite"})

    assert storage == SqliteFile(Path("/data/threads.sqlite"))


def test_the_database_belongs_to_its_user_alone(tmp_path: Path) -> None:
    """Conversations are nobody else's to read: directory 0700, file 0600."""
    database = tmp_path / "kept" / "threads.sqlite"

    open_checkpointer(SqliteFile(database))

    assert database.parent.stat().st_mode & 0o777 == 0o700
    assert database.stat().st_mode & 0o777 == 0o600


def test_threads_may_be_kept_nowhere() -> None:
    """`memory` is no file's name, but the word for none."""
    assert read_storage({"AGENT_DATABASE": "memory"}) == Memory()
    assert type(open_checkpointer(Memory())).__name__ == "OwnedMemory"
