"""`ValohaiResource`: files and values of executions, for assets and checks written in Python."""

from __future__ import annotations

from typing import BinaryIO

import dagster as dg
from dagster import AssetKey, AssetRecordsFilter, DagsterInstance
from pydantic import Field, PrivateAttr

from valohai_dagster.errors import NotFoundError
from valohai_dagster.executions.stream import DatumView, ExecutionView
from valohai_dagster.plugin.results import EXECUTION_ID_KEY


class ValohaiResource(dg.ConfigurableResource[object]):
    """Reads what executions left behind; needs the records and stores, but neither Redis nor the service.

    @dg.asset(deps=[["digits", "train"]])
    def report(context: dg.AssetExecutionContext, valohai: ValohaiResource):
        execution = valohai.latest(context.instance, ["digits", "train"])
        with valohai.open(execution.outputs[0]) as model:
            ...
        faces = valohai.files("dataset://faces/latest", project="digits")
    """

    settings_file: str | None = Field(
        None, description="valohai.toml to use. Default: the usual search."
    )
    _opened: object = PrivateAttr(default=None)

    def latest(
        self,
        instance: DagsterInstance,
        asset_key: AssetKey | list[str],
        *,
        partition_key: str | None = None,
    ) -> ExecutionView:
        """The execution behind the newest materialization of a step's asset, or of one partition of it."""
        key = AssetKey.from_coercible(asset_key)
        partitions = None if partition_key is None else [partition_key]
        wanted = AssetRecordsFilter(asset_key=key, asset_partitions=partitions)
        record = next(iter(instance.fetch_materializations(wanted, limit=1).records), None)
        materialization = record.asset_materialization if record else None
        value = materialization.metadata.get(EXECUTION_ID_KEY) if materialization else None
        if value is None:
            of = f"partition {partition_key} of " if partition_key is not None else ""
            raise NotFoundError(
                f"{of}asset {key.to_user_string()} has no materialization by an execution; materialize it first"
            )
        return self.execution(str(value.value))

    def execution(self, execution_id: str) -> ExecutionView:
        from valohai_dagster.executions.views import view_of
        from valohai_dagster.records.engine import open_records

        settings = self._settings()
        records = open_records(settings)
        try:
            with records.read() as connection:
                view = view_of(connection, execution_id, datum_url=settings.datum_url)
        finally:
            records.close()
        if view is None:
            raise NotFoundError(
                f"the records know no execution {execution_id}; check state_dir and database_url"
            )
        return view

    def files(self, reference: str, *, project: str) -> list[DatumView]:
        """Files of `dataset://NAME/VERSION`, `model://SLUG/NUMBER`, a datum id or alias, or a name with `*`."""
        import sqlalchemy as sa

        from valohai_dagster.data.references import find_datums
        from valohai_dagster.executions.views import datum_view
        from valohai_dagster.records.engine import open_records
        from valohai_dagster.records.tables import projects

        settings = self._settings()
        records = open_records(settings)
        try:
            with records.read() as connection:
                query = sa.select(projects.c.id).where(projects.c.name == project)
                project_id = connection.execute(query).scalar_one_or_none()
                if project_id is None:
                    raise NotFoundError(f"the records know no project {project!r}")
                found = find_datums(connection, reference, project_id=project_id)
        finally:
            records.close()
        return [datum_view(datum, settings.datum_url) for datum in found]

    def open(self, datum: DatumView | str) -> BinaryIO:
        """The content of a datum, by view, id or `datum://<id>`."""
        import sqlalchemy as sa

        from valohai_dagster.records.engine import open_records
        from valohai_dagster.records.tables import datums
        from valohai_dagster.stores.registry import open_stores

        ident = datum.id if isinstance(datum, DatumView) else datum.removeprefix("datum://")
        settings = self._settings()
        records = open_records(settings)
        try:
            with records.read() as connection:
                query = sa.select(datums.c.store, datums.c.key).where(datums.c.id == ident)
                row = connection.execute(query).one_or_none()
        finally:
            records.close()
        if row is None:
            raise NotFoundError(f"the records know no datum {ident}")
        return open_stores(settings)[row.store].open(row.key)

    def _settings(self):
        from pathlib import Path

        from valohai_dagster.settings import load_settings

        return load_settings(Path(self.settings_file) if self.settings_file else None)
