"""What the driver needs of the platform besides the execution service: archives, views, logs and small files.

Everything here blocks and is called on lanes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from valohai_dagster.errors import ValohaiError
from valohai_dagster.executions.stream import DatumView, ExecutionView
from valohai_dagster.executions.views import Origin, origins_of, view_of
from valohai_dagster.plugin.backend import TAIL_BYTES
from valohai_dagster.plugin.commits import LaunchCommit, commit_for
from valohai_dagster.plugin.log_source import ServiceLogs, last_lines
from valohai_dagster.records import tables as t

if TYPE_CHECKING:
    from valohai_dagster.executions.spec import StepConfig
    from valohai_dagster.plugin.step_tag import StepTag
    from valohai_dagster.records.engine import Records
    from valohai_dagster.settings import Settings
    from valohai_dagster.stores.registry import Stores


class Platform:
    """Records, stores and logs of one deployment."""

    def __init__(self, settings: Settings, records: Records, stores: Stores) -> None:
        self.settings = settings
        self.records = records
        self.stores = stores
        self._logs = ServiceLogs(lambda: settings)

    def commit(self, tag: StepTag, config: StepConfig) -> LaunchCommit:
        """The step at the commit that the launch asks for, its archive, and warnings about that."""
        return commit_for(
            tag, config, records=self.records, stores=self.stores, settings=self.settings
        )

    def view(self, execution_id: str) -> ExecutionView | None:
        with self.records.read() as connection:
            return view_of(connection, execution_id, datum_url=self.settings.datum_url)

    def origins(self, datum_ids: Collection[str]) -> Mapping[str, Origin]:
        with self.records.read() as connection:
            return origins_of(connection, datum_ids)

    def client_data(self, execution_id: str) -> Mapping[str, Any]:
        """What the driver kept with the execution when it was submitted."""
        query = sa.select(t.executions.c.spec).where(t.executions.c.id == execution_id)
        with self.records.read() as connection:
            spec = connection.execute(query).scalar_one_or_none()
        return (spec or {}).get("client") or {}

    def last_stderr(self, execution_id: str, lines: int) -> list[str]:
        try:
            sections = self._logs.index_of_execution(execution_id).sections
            return last_lines(self._logs, sections[-1], lines, TAIL_BYTES) if sections else []
        except (ValohaiError, OSError):
            return []

    def read_small(self, datum: DatumView) -> bytes | None:
        query = sa.select(t.datums.c.store, t.datums.c.key).where(t.datums.c.id == datum.id)
        try:
            with self.records.read() as connection:
                row = connection.execute(query).one_or_none()
            if row is None:
                return None
            with self.stores[row.store].open(row.key) as file:
                return file.read(datum.size)
        except (ValohaiError, OSError):
            return None
