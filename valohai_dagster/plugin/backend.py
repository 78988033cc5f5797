"""What the compute function needs of the platform: the service, the code store, and files of executions.

One small object, so that tests of the Dagster face run without Redis, database or agents.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from valohai_agent.protocol import utcnow
from valohai_dagster.errors import StoreError, ValohaiError
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.executions.stream import DatumView, ExecutionView, FollowEvent
from valohai_dagster.plugin.log_sections import Chunk
from valohai_dagster.projects.project import Project

if TYPE_CHECKING:
    from valohai_dagster.executions.views import Origin
    from valohai_dagster.settings import Settings

TAIL_BYTES = 64 * 1024  # of stderr, searched for its last lines


class Backend(Protocol):
    """Everything raises errors of `valohai_dagster.errors` only."""

    def submit(self, spec: ExecutionSpec) -> None: ...

    def rejoinable(self, spec: ExecutionSpec, parent_run_ids: Sequence[str]) -> str | None:
        """The execution that a dead process of the same step has left behind, see `executions.rejoin`."""
        ...

    def follow(self, execution_id: str) -> Iterator[FollowEvent | None]: ...

    def stop(self, execution_id: str, *, hard: bool = False, reason: str = "") -> None: ...

    def view(self, execution_id: str) -> ExecutionView | None: ...

    def origins(self, datum_ids: Collection[str]) -> Mapping[str, Origin]:
        """Which executions made these datums."""
        ...

    def publish(self, project: Project) -> tuple[CommitRef, tuple[str, ...]]:
        """The commit with its archive in the code store, and warnings about its content."""
        ...

    def read_small(self, datum: DatumView) -> bytes | None:
        """The content of a small file; None when it cannot be read, which is no reason to fail."""
        ...

    def log_after(self, execution_id: str, cursor: str | None) -> Chunk | None:
        """What the execution printed since the cursor."""
        ...

    def last_stderr(self, execution_id: str, lines: int) -> list[str]:
        """The last lines that the user's command wrote to stderr, for the failure message."""
        ...


class ServiceBackend:
    """The real thing, on the deployment's settings."""

    def __init__(self, settings: Settings) -> None:
        from valohai_dagster.executions.client import ExecutionClient
        from valohai_dagster.plugin.log_source import ServiceLogs
        from valohai_dagster.stores.registry import open_stores

        self.settings = settings
        self._client = ExecutionClient.open(settings)
        self._stores = open_stores(settings)
        self._logs = ServiceLogs(lambda: settings)

    def submit(self, spec: ExecutionSpec) -> None:
        self._client.submit(spec)

    def rejoinable(self, spec: ExecutionSpec, parent_run_ids: Sequence[str]) -> str | None:
        from valohai_dagster.executions.rejoin import execution_to_rejoin

        with self._client.records.read() as connection:
            return execution_to_rejoin(connection, spec, parent_run_ids)

    def follow(self, execution_id: str) -> Iterator[FollowEvent | None]:
        return self._client.follow(execution_id)

    def stop(self, execution_id: str, *, hard: bool = False, reason: str = "") -> None:
        self._client.stop(execution_id, hard=hard, reason=reason)

    def view(self, execution_id: str) -> ExecutionView | None:
        return self._client.view(execution_id)

    def origins(self, datum_ids: Collection[str]) -> Mapping[str, Origin]:
        from valohai_dagster.executions.views import origins_of

        with self._client.records.read() as connection:
            return origins_of(connection, datum_ids)

    def publish(self, project: Project) -> tuple[CommitRef, tuple[str, ...]]:
        from valohai_dagster.executions.archives import publish_archive

        records = self._client.records
        return publish_archive(project, records=records, stores=self._stores, now=utcnow())

    def read_small(self, datum: DatumView) -> bytes | None:
        import sqlalchemy as sa

        from valohai_dagster.records.tables import datums

        query = sa.select(datums.c.store, datums.c.key).where(datums.c.id == datum.id)
        try:
            with self._logs.records().read() as connection:
                row = connection.execute(query).one_or_none()
            if row is None:
                return None
            with self._stores[row.store].open(row.key) as file:
                return file.read(datum.size)
        except (ValohaiError, StoreError, OSError):
            return None

    def log_after(self, execution_id: str, cursor: str | None) -> Chunk | None:
        from valohai_dagster.plugin.log_sections import read_sections

        try:
            index = self._logs.index_of_execution(execution_id)
            return (
                read_sections(index.sections, cursor, self._logs, None) if index.sections else None
            )
        except (ValohaiError, OSError):
            return None

    def last_stderr(self, execution_id: str, lines: int) -> list[str]:
        from valohai_dagster.plugin.log_source import last_lines

        try:
            sections = self._logs.index_of_execution(execution_id).sections
            return last_lines(self._logs, sections[-1], lines, TAIL_BYTES) if sections else []
        except (ValohaiError, OSError):
            return []


def open_backend() -> Backend:
    """Opens the deployment that the current directory and environment name."""
    from valohai_dagster.settings import load_settings

    return ServiceBackend(load_settings())
