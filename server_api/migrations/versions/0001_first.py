"""The first schema.

A migration never changes once released, so it does not import today's tables.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.String(64)


def upgrade() -> None:
    """Returns nothing; every table of version 0.1 exists."""
    op.create_table(
        "devices",
        sa.Column("device", _ID, nullable=False),
        sa.Column("name", _ID),
        sa.Column("capabilities", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("last_seen", sa.Double),
        sa.PrimaryKeyConstraint("device", name="pk_devices"),
    )
    op.create_table(
        "tokens",
        sa.Column("digest", _ID, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("device", _ID),
        sa.PrimaryKeyConstraint("digest", name="pk_tokens"),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name="fk_tokens_device"),
    )
    op.create_table(
        "bundles",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", _ID, nullable=False),
        sa.Column("layout", _ID, nullable=False),
        sa.Column("thresholds", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bundles"),
    )
    op.create_table(
        "runs",
        sa.Column("run", _ID, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("bundle", _ID, nullable=False),
        sa.Column("layout", _ID, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("rounds_done", sa.Integer, nullable=False),
        sa.Column("rounds_failed", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("paused_since", sa.Double),
        sa.PrimaryKeyConstraint("run", name="pk_runs"),
        sa.ForeignKeyConstraint(["bundle"], ["bundles.id"], name="fk_runs_bundle"),
    )
    op.create_table(
        "rounds",
        sa.Column("run", _ID, nullable=False),
        sa.Column("round", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("opened", sa.Double, nullable=False),
        sa.Column("deadline", sa.Double, nullable=False),
        sa.Column("extended", sa.Boolean, nullable=False),
        sa.Column("closed", sa.Double),
        sa.Column("figures", sa.Text),
        sa.PrimaryKeyConstraint("run", "round", name="pk_rounds"),
        sa.ForeignKeyConstraint(["run"], ["runs.run"], name="fk_rounds_run"),
    )
    op.create_table(
        "leases",
        sa.Column("run", _ID, nullable=False),
        sa.Column("round", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device", _ID, nullable=False),
        sa.Column("expires", sa.Double, nullable=False),
        sa.Column("lapsed", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("run", "round", "device", name="pk_leases"),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name="fk_leases_device"),
        sa.ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"], name="fk_leases_run"),
    )
    op.create_table(
        "updates",
        sa.Column("run", _ID, nullable=False),
        sa.Column("round", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device", _ID, nullable=False),
        sa.Column("digest", _ID, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run", "round", "device", name="pk_updates"),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name="fk_updates_device"),
        sa.ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"], name="fk_updates_run"),
    )
    op.create_index("ix_updates_device", "updates", ["device"])
    op.create_table(
        "thresholds",
        sa.Column("run", _ID, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run", "version", name="pk_thresholds"),
        sa.ForeignKeyConstraint(["run"], ["runs.run"], name="fk_thresholds_run"),
    )
    op.create_table(
        "events",
        sa.Column("run", _ID, nullable=False),
        sa.Column("id", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("round", sa.Integer),
        sa.Column("device", _ID),
        sa.Column("data", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run", "id", name="pk_events"),
        sa.ForeignKeyConstraint(["run"], ["runs.run"], name="fk_events_run"),
    )
