"""Everything that is true of SQLite only.

WAL                 readers do not wait for the writer
synchronous=FULL    a commit is on the disk when it returns; in WAL mode this is one fsync
BEGIN IMMEDIATE     a writer waits for its turn at the start. With the default (deferred) two writers that have
                    read cannot both go on, and one fails or, if it retries carelessly, loses its update.
"""

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

WRITES = "spafl_writes"
"""Execution option of connections that will write."""

BUSY_MILLISECONDS = 15_000
"""How long a writer waits for another process's transaction before it gives up."""


def prepare(engine: Engine) -> None:
    """Returns nothing; every connection of `engine` gets SQLite's settings and transactions as above."""
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)


def _on_connect(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # the driver would begin transactions on its own terms; ours begin in _on_begin
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_MILLISECONDS}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
