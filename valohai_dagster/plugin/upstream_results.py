"""What the upstream assets of a step last produced, and which of their events the step used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dagster import (
    AssetExecutionContext,
    AssetKey,
    AssetRecordsFilter,
    DagsterEventType,
    EventLogRecord,
)

from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.plugin.compat import input_storage_id, pin_input
from valohai_dagster.plugin.results import EXECUTION_ID_KEY
from valohai_dagster.plugin.step_tag import edges_into
from valohai_dagster.projects.project import Project
from valohai_dagster.projects.upstream import UpstreamFile, UpstreamResult

MAX_PARENT_RUNS = 50  # a chain of re-executions longer than this is cut
PARENT_RUN_TAG = "dagster/parent_run_id"
FindView = Callable[[str], "ExecutionView | None"]


def asset_key_of(project: Project, step: str) -> AssetKey:
    return AssetKey([project.asset_name, project.steps[step].asset_name])


def upstream_results(
    context: AssetExecutionContext, project: Project, step: str, find_view: FindView
) -> dict[str, UpstreamResult | None]:
    """Results by source step; None for one that was never materialized, or not by an execution that we know."""
    out: dict[str, UpstreamResult | None] = {}
    for edge in edges_into(project, step):
        source = edge.source_step
        if source in out or source not in project.steps:
            continue
        record = used_materialization(context, asset_key_of(project, source))
        execution_id = execution_id_in(record) if record else None
        view = find_view(execution_id) if execution_id else None
        if record is not None and view is None:
            context.log.warning(
                f"the upstream asset of step {source!r} has a materialization that no execution in these records made "
                f"(execution {execution_id or 'unknown'}); materialize it again, or check state_dir and database_url"
            )
        out[source] = upstream_result(view) if view else None
    return out


def used_materialization(context: AssetExecutionContext, key: AssetKey) -> EventLogRecord | None:
    """The materialization that this step uses: of its own run, else of the runs it re-executes, else the latest.

    So a step never picks up what another run made meanwhile; the engine's provenance tags are told about it.
    """
    latest_id = input_storage_id(context, key)
    own = _of_run_or_parents(context, key)
    if own is not None:
        if own.storage_id != latest_id:
            pin_input(context, key, own)
        return own
    if latest_id is None:
        return None
    found = context.instance.fetch_materializations(
        AssetRecordsFilter(asset_key=key, storage_ids=[latest_id]), limit=1
    )
    return next(iter(found.records), None)


def _of_run_or_parents(context: AssetExecutionContext, key: AssetKey) -> EventLogRecord | None:
    run: Any = context.run
    for _ in range(MAX_PARENT_RUNS):
        record = _of_run(context, run.run_id, key)
        parent = run.parent_run_id or run.tags.get(PARENT_RUN_TAG)
        if record is not None or not parent:
            return record
        run = context.instance.get_run_by_id(parent)
        if run is None:
            return None
    return None


def _of_run(context: AssetExecutionContext, run_id: str, key: AssetKey) -> EventLogRecord | None:
    records = context.instance.get_records_for_run(
        run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION, ascending=False
    ).records
    return next((record for record in records if record.asset_key == key), None)


def execution_id_in(record: EventLogRecord) -> str | None:
    materialization = record.asset_materialization
    value = materialization.metadata.get(EXECUTION_ID_KEY) if materialization else None
    return str(value.value) if value is not None else None


def upstream_result(view: ExecutionView) -> UpstreamResult:
    inputs: dict[str, tuple[UpstreamFile, ...]] = {}
    for item in view.inputs:
        uri = f"datum://{item.datum_id}" if item.datum_id else item.uri
        inputs[item.input] = (*inputs.get(item.input, ()), UpstreamFile(name=item.name, uri=uri))
    return UpstreamResult(
        outputs=tuple(UpstreamFile(name=datum.name, uri=datum.uri) for datum in view.outputs),
        inputs=inputs,
        parameters=view.parameters,
        metadata=view.latest_metadata,
    )
