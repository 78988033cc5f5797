"""Alembic's entry: runs the migrations on the connection that `records.schema` hands over."""

from __future__ import annotations

from alembic import context

from valohai_dagster.records.capacity_tables import metadata
from valohai_dagster.records.schema import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
