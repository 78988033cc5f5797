"""Records (SQLite) and a local store with one project."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from valohai_dagster.data.datums import Datum, create_datum, new_id
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.resolve import ResolvedInputs, resolve_inputs
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.records.store import insert_ignore
from valohai_dagster.records.tables import projects
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import GroupSettings
from valohai_dagster.stores.registry import Stores, open_stores

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=timezone.utc)


@dataclass(kw_only=True)
class Place:
    """A deployment without services."""

    records: Records
    stores: Stores
    group: GroupSettings
    project: str = "p1"

    def datum(self, name: str, content: bytes = b"x", **changes: Any) -> Datum:
        """A stored file with its record."""
        datum_id = new_id()
        key = f"data/{datum_id}/f"
        self.stores.default.put(key, content)
        values: dict[str, Any] = {
            "id": datum_id, "name": name, "size": len(content), "store": "local", "key": key,
            "project_id": self.project, "ctime": NOW, "sha256": "ab" * 32,
        }  # fmt: skip
        datum = Datum(**{**values, **changes})
        with self.records.write() as connection:
            create_datum(connection, datum)
        return datum

    def put(self, *keys: str) -> None:
        for key in keys:
            self.stores.default.put(key, key.encode())

    def resolve(self, *inputs: InputSpec) -> ResolvedInputs:
        with self.records.read() as connection:
            return resolve_inputs(
                inputs,
                connection=connection,
                stores=self.stores,
                group=self.group,
                project_id=self.project,
            )


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """SQLite, or what an indirect parameter says."""
    values: dict[str, Any] = {"state_dir": tmp_path / "state"}
    if getattr(request, "param", "sqlite") == "postgres":
        values["database_url"] = request.getfixturevalue("postgres_url")
    settings = Settings(**values)
    records = open_records(settings)
    with records.write() as connection:
        for number in (1, 2):
            insert_ignore(
                connection,
                projects,
                id=f"p{number}",
                name=f"project {number}",
                counter=0,
                ctime=NOW,
            )
    yield Place(records=records, stores=open_stores(settings), group=settings.groups["local"])
    records.close()
