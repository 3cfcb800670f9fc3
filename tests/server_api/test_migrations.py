"""The migrations and the tables say the same, and a database of another time is handled."""

import sqlite3

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from server_api.migrations import upgrade
from server_api.sql_store import SqlStore
from server_api.tables import metadata
from spafl.errors import SettingsError


def test_the_migrations_build_exactly_the_tables(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.begin() as connection:
        upgrade(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_opening_twice_changes_nothing(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    SqlStore(url).close()
    schema = "SELECT sql FROM sqlite_master ORDER BY name"
    with sqlite3.connect(tmp_path / "x.db") as before:
        first = before.execute(schema).fetchall()
    SqlStore(url).close()
    with sqlite3.connect(tmp_path / "x.db") as after:
        assert after.execute(schema).fetchall() == first
    before.close()
    after.close()


def test_a_database_of_a_newer_version_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    SqlStore(url).close()
    connection = sqlite3.connect(tmp_path / "x.db")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    with pytest.raises(SettingsError, match="the version that wrote it"):
        SqlStore(url)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(SettingsError, match="cannot open database"):
        SqlStore(f"sqlite:///{tmp_path / 'x.db'}")


def test_the_database_runs_as_the_design_says(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path / 'x.db'}")
    with store._engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    store.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
