"""Partitioned steps on a real DagsterInstance, with a backend that plays the platform."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey, AssetRecordsFilter, DagsterEventType, DagsterInstance

from tests.support.dagster_face import FakeBackend, project_of
from valohai_dagster.errors import NotFoundError
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.plugin.assets import project_assets
from valohai_dagster.plugin.resources import ValohaiResource

DAILY = """
- step:
    name: prep
    image: python:3.11
    command: python prep.py {parameters}
    parameters:
      - {name: day, type: string}
- step:
    name: train
    image: python:3.11
    command: python train.py
    inputs:
      - name: data
- pipeline:
    name: all
    nodes:
      - {name: prep, type: execution, step: prep}
      - {name: train, type: execution, step: train}
    edges:
      - [prep.output.*, train.input.data]
"""
PREP, TRAIN = AssetKey(["digits", "prep"]), AssetKey(["digits", "train"])
DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", end_date="2026-01-06")


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with dg.instance_for_test() as found:
        yield found


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def assets_of(backend: FakeBackend, **options: Any) -> list[dg.AssetsDefinition]:
    given = {"partitions_def": DAYS, "partition_parameter": "day", **options}
    return project_assets(project_of(DAILY), open_backend=lambda: backend, **given)


def run(assets: Any, instance: DagsterInstance, **options: Any) -> Any:
    return dg.materialize(assets, instance=instance, **options)


def range_tags(first: str, last: str) -> dict[str, str]:
    return {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}


def uris(backend: FakeBackend, *specs: ExecutionSpec) -> list[str]:
    return [datum.uri for spec in specs for datum in backend.views[spec.execution_id].outputs]


def partitions_of(instance: DagsterInstance, key: AssetKey) -> list[str | None]:
    records = instance.fetch_materializations(key, limit=50, ascending=True).records
    return [record.partition_key for record in records]


def test_one_partition_is_one_execution_with_its_key(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assert run(assets_of(backend), instance, partition_key="2026-01-02").success
    prep, train = backend.submitted
    assert prep.commands == ["python prep.py --day=2026-01-02"]
    assert prep.partition_key == train.partition_key == "2026-01-02"
    assert train.environment_variables["VH_PARTITION_KEY"] == "2026-01-02"
    assert "partition:2026-01-02" in train.tags
    assert partitions_of(instance, PREP) == ["2026-01-02"]


def test_downstream_uses_its_own_partition_and_not_the_latest(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend)
    run(assets, instance, partition_key="2026-01-01", selection=[PREP])
    run(assets, instance, partition_key="2026-01-02", selection=[PREP])
    run(assets, instance, partition_key="2026-01-01", selection=[TRAIN])
    first, second, train = backend.submitted
    assert train.inputs[0].uris == uris(backend, first) != uris(backend, second)


def test_a_partition_that_was_never_made_is_named(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend)
    run(assets, instance, partition_key="2026-01-01", selection=[PREP])
    result = run(
        assets, instance, partition_key="2026-01-02", selection=[TRAIN], raise_on_error=False
    )
    assert not result.success
    texts = [
        r.event_log_entry.user_message for r in instance.get_records_for_run(result.run_id).records
    ]
    assert any(
        "1 of 1 partitions of digits/prep" in text and "2026-01-02" in text for text in texts
    )
    assert len(backend.submitted) == 1


def test_a_range_is_one_execution_and_one_materialization_per_partition(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend, backfill_policy=dg.BackfillPolicy.single_run())
    result = run(assets, instance, tags=range_tags("2026-01-02", "2026-01-04"))
    assert result.success
    days = ["2026-01-02", "2026-01-03", "2026-01-04"]
    prep, train = backend.submitted
    assert prep.partition_key == "2026-01-02...2026-01-04"
    assert json.loads(prep.environment_variables["VH_PARTITION_KEYS"]) == days
    assert partitions_of(instance, PREP) == partitions_of(instance, TRAIN) == days
    assert train.inputs[0].uris == uris(backend, prep)


def test_a_range_takes_the_files_of_every_upstream_partition(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend, backfill_policy=dg.BackfillPolicy.single_run())
    for day in ("2026-01-03", "2026-01-01", "2026-01-02"):
        run(assets, instance, partition_key=day, selection=[PREP])
    third, first, second = backend.submitted
    run(assets, instance, tags=range_tags("2026-01-01", "2026-01-03"), selection=[TRAIN])
    assert backend.submitted[-1].inputs[0].uris == uris(backend, first, second, third)


def test_a_step_without_partitions_takes_all_of_its_upstreams_partitions(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend, partitions_def={"prep": DAYS})
    for day in ("2026-01-01", "2026-01-02"):
        run(assets, instance, partition_key=day, selection=[PREP])
    assert run(assets, instance, selection=[TRAIN]).success
    first, second, train = backend.submitted
    assert train.inputs[0].uris == uris(backend, first, second)
    assert train.partition_key is None


def test_a_mapping_that_is_not_the_default_is_followed(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    yesterday = dg.TimeWindowPartitionMapping(start_offset=-1, end_offset=-1)
    assets = assets_of(backend, partition_mappings={"train": {"prep": yesterday}})
    run(assets, instance, partition_key="2026-01-01", selection=[PREP])
    run(assets, instance, partition_key="2026-01-02", selection=[TRAIN])
    prep, train = backend.submitted
    assert train.inputs[0].uris == uris(backend, prep)


def test_partitions_of_two_dimensions(instance: DagsterInstance, backend: FakeBackend) -> None:
    regions = dg.StaticPartitionsDefinition(["north", "south"])
    both = dg.MultiPartitionsDefinition({"day": DAYS, "region": regions})
    key = dg.MultiPartitionKey({"day": "2026-01-02", "region": "south"})
    assert run(assets_of(backend, partitions_def=both), instance, partition_key=key).success
    prep = backend.submitted[0]
    assert prep.parameters == {"day": "2026-01-02|south"}
    assert prep.environment_variables["VH_PARTITION_KEY_DAY"] == "2026-01-02"
    assert prep.environment_variables["VH_PARTITION_KEY_REGION"] == "south"


def test_a_run_that_names_no_partition_says_so(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    job = dg.Definitions(assets=assets_of(backend)).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, raise_on_error=False)
    records = instance.get_records_for_run(
        result.run_id, of_type=DagsterEventType.STEP_FAILURE
    ).records
    event = records[0].event_log_entry.dagster_event
    assert event is not None
    failure = event.step_failure_data.user_failure_data
    assert failure is not None
    assert "has partitions, and the run names none of them" in (failure.description or "")
    assert not backend.submitted


def test_a_re_execution_uses_its_parent_runs_partition(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend)
    parent = run(assets, instance, partition_key="2026-01-01", selection=[PREP])
    backend.content = {"part.csv": b"other"}
    run(assets, instance, partition_key="2026-01-01", selection=[PREP])
    lineage = {"dagster/parent_run_id": parent.run_id, "dagster/root_run_id": parent.run_id}
    run(assets, instance, partition_key="2026-01-01", selection=[TRAIN], tags=lineage)
    first, _, train = backend.submitted
    assert train.inputs[0].uris == uris(backend, first)
    used = provenance(instance, PREP, 0), provenance(instance, TRAIN, -1)
    assert used[0]["storage_id"] == int(used[1]["dagster/input_event_pointer/digits/prep"])


def provenance(instance: DagsterInstance, key: AssetKey, index: int) -> dict[str, Any]:
    wanted = AssetRecordsFilter(asset_key=key)
    record = instance.fetch_materializations(wanted, limit=50, ascending=True).records[index]
    assert record.asset_materialization is not None
    return {"storage_id": record.storage_id, **(record.asset_materialization.tags or {})}


def test_the_resource_finds_the_execution_of_a_partition(
    instance: DagsterInstance, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ValohaiResource, "execution", lambda self, ident: backend.views[ident])
    assets = assets_of(backend)
    for day in ("2026-01-01", "2026-01-02"):
        run(assets, instance, partition_key=day, selection=[PREP])
    first, second = (spec.execution_id for spec in backend.submitted)
    resource = ValohaiResource(settings_file=None)
    assert resource.latest(instance, PREP).id == second
    assert resource.latest(instance, PREP, partition_key="2026-01-01").id == first
    with pytest.raises(NotFoundError, match="partition 2026-01-03 of asset digits/prep has no"):
        resource.latest(instance, PREP, partition_key="2026-01-03")
