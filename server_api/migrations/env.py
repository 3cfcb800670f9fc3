"""Run by alembic for every migration: uses the connection it is given and nothing else."""

from alembic import context

from server_api.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
