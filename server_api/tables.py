"""The tables, as SQLAlchemy knows them. Migrations build them; a test holds both equal.

Columns are named after the protocol's words. Times are seconds since the epoch. JSON is text that a record wrote.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

_ID = String(64)

devices = Table(
    "devices",
    metadata,
    Column("device", _ID, primary_key=True),
    Column("name", _ID),
    Column("capabilities", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("last_seen", Double),
)

tokens = Table(
    "tokens",
    metadata,
    Column("digest", _ID, primary_key=True),
    Column("role", String(16), nullable=False),
    Column("device", _ID, ForeignKey("devices.device")),
)

bundles = Table(
    "bundles",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("name", _ID, nullable=False),
    Column("layout", _ID, nullable=False),
    Column("thresholds", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created", Double, nullable=False),
    Column("manifest", LargeBinary, nullable=False),
)

# `revision` is the id of the run's last event: whoever has seen it knows the run's state
runs = Table(
    "runs",
    metadata,
    Column("run", _ID, primary_key=True),
    Column("settings", Text, nullable=False),
    Column("bundle", _ID, ForeignKey("bundles.id"), nullable=False),
    Column("layout", _ID, nullable=False),
    Column("created", Double, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("number", Integer, nullable=False),
    Column("rounds_done", Integer, nullable=False),
    Column("rounds_failed", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("paused_since", Double),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", _ID, ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("opened", Double, nullable=False),
    Column("deadline", Double, nullable=False),
    Column("extended", Boolean, nullable=False),
    Column("closed", Double),
    Column("figures", Text),
)

leases = Table(
    "leases",
    metadata,
    Column("run", _ID, primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("device", _ID, ForeignKey("devices.device"), primary_key=True),
    Column("expires", Double, nullable=False),
    Column("lapsed", Boolean, nullable=False),
    ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"]),
)

updates = Table(
    "updates",
    metadata,
    Column("run", _ID, primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("device", _ID, ForeignKey("devices.device"), primary_key=True),
    Column("digest", _ID, nullable=False),
    Column("metrics", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"]),
    Index(None, "device"),
)

thresholds = Table(
    "thresholds",
    metadata,
    Column("run", _ID, ForeignKey("runs.run"), primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("run", _ID, ForeignKey("runs.run"), primary_key=True),
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("time", Double, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("round", Integer),
    Column("device", _ID),
    Column("data", Text, nullable=False),
)
