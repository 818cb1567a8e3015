"""The schema of the key store, version by version, and the two questions about it: is it newest, make it so.

Asks the connection that it is given; opens none itself.
"""

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

_LOCK = 0x616670  # "afp", an arbitrary number of our own


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, within the connection's transaction."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def is_at_head(connection: Connection) -> bool:
    """Say whether the schema is the newest version that this package knows, no older and no newer."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    return MigrationContext.configure(connection).get_current_revision() == head


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "proxy:migrations")
    config.set_main_option("path_separator", "os")
    return config
