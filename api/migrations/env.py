"""Runs the migrations in the transaction that the service opened for them."""

from alembic import context

from api.database import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
