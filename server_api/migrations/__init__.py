"""The database's schema, step by step; `upgrade` takes any older database to today's."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from spafl.errors import SettingsError


def configuration(connection: Connection) -> Config:
    """Returns alembic's configuration for the database behind `connection`."""
    config = Config()
    # a % would be taken for an interpolation
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection) -> None:
    """Returns nothing; the database behind `connection`, empty or older, has today's schema, in one transaction.

    Raises:
        SettingsError: the database was written by a newer version.
    """
    try:
        command.upgrade(configuration(connection), "head")
    except CommandError as error:
        raise SettingsError(
            f"the database is not one this version can read ({error}): run the version that wrote it, or newer"
        ) from error
