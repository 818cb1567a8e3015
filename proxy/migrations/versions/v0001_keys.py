"""Keys, and the number of their last change.

A name belongs to one key that is neither replaced nor revoked; nothing is ever deleted.
"""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the two tables."""
    op.create_table(
        "api_keys",
        sql.Column("id", sql.String(12), primary_key=True),
        sql.Column("name", sql.String(64), nullable=False),
        sql.Column("digest", sql.String(64), nullable=False),
        sql.Column("scopes", sql.Text, nullable=False),
        sql.Column("tier", sql.String(64), nullable=False),
        sql.Column("rate", sql.String(255)),
        sql.Column("caller", sql.String(12), nullable=False),
        sql.Column("created", sql.BigInteger, nullable=False),
        sql.Column("expires", sql.BigInteger),
        sql.Column("last_used", sql.BigInteger),
        sql.Column("created_by", sql.String(255), nullable=False),
        sql.Column("replaced_by", sql.String(12)),
        sql.Column("grace_ends", sql.BigInteger),
        sql.Column("revoked", sql.BigInteger),
        sql.Column("changed", sql.BigInteger, nullable=False),
    )
    op.create_index("api_keys_changed", "api_keys", ["changed"])
    current = sql.text("replaced_by IS NULL AND revoked IS NULL")
    op.create_index("api_keys_name", "api_keys", ["name"], unique=True, sqlite_where=current, postgresql_where=current)
    changes = op.create_table("key_changes", sql.Column("number", sql.BigInteger, nullable=False))
    op.bulk_insert(changes, [{"number": 0}])
