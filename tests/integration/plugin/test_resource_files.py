"""`ValohaiResource.files`: datasets, models and datums for assets that are written in Python."""

from __future__ import annotations

import pytest

from tests.integration.data.conftest import NOW
from valohai_dagster import ValohaiResource
from valohai_dagster.data import datasets
from valohai_dagster.data.datums import Datum, create_datum, new_id
from valohai_dagster.errors import NotFoundError
from valohai_dagster.executions.ledger import ensure_project
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings
from valohai_dagster.stores.registry import open_stores


@pytest.fixture
def datum() -> Datum:
    """A stored file in the version `faces/v1` of the project `digits`."""
    settings = load_settings()
    open_stores(settings).default.put("k/a", b"content")
    records = open_records(settings)
    with records.write() as connection:
        project = ensure_project(connection, "digits", NOW)
        datum = Datum(
            id=new_id(),
            name="a",
            size=7,
            store="local",
            key="k/a",
            project_id=project,
            ctime=NOW,
            metadata={"color": "red"},
        )
        create_datum(connection, datum)
        datasets.create_version(
            connection,
            project_id=project,
            uri="dataset://faces/v1",
            datum_ids=[datum.id],
            now=NOW,
        )
    records.close()
    return datum


def test_files_of_a_dataset_version_can_be_read(datum: Datum) -> None:
    resource = ValohaiResource(settings_file=None)
    for reference in ("dataset://faces/latest", datum.id, "a*"):
        (found,) = resource.files(reference, project="digits")
        assert (found.uri, found.name, found.metadata) == (datum.uri, "a", {"color": "red"})
        with resource.open(found) as file:
            assert file.read() == b"content"
    with pytest.raises(NotFoundError, match="no dataset 'x'"):
        resource.files("dataset://x/v", project="digits")
    with pytest.raises(NotFoundError, match="no project 'none'"):
        resource.files("dataset://faces/v1", project="none")
