"""What the upstream assets of a step last produced, and which of their events the step used.

Nothing here needs user code or a context: op processes and the run driver share it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from dagster import (
    AssetKey,
    AssetRecordsFilter,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    EventLogRecord,
)

from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.plugin.results import EXECUTION_ID_KEY
from valohai_dagster.plugin.step_tag import StepTag
from valohai_dagster.projects.upstream import UpstreamFile, UpstreamResult

MAX_PARENT_RUNS = 50  # a chain of re-executions longer than this is cut
PAGE = 500  # records of one query
MAX_NAMED = 10  # partitions in a warning
PARENT_RUN_TAG = "dagster/parent_run_id"
FindView = Callable[[str], "ExecutionView | None"]
FindRecords = Callable[[AssetKey], Sequence[EventLogRecord]]


def upstream_of(
    tag: StepTag, find_records: FindRecords, find_view: FindView, warn: Callable[[str], None]
) -> dict[str, UpstreamResult | None]:
    """Results by source step; None for one that was never materialized, or not by an execution that we know.

    `find_records` gives the materializations that the step uses: one, or one per partition that it depends on.
    Several add up.
    """
    out: dict[str, UpstreamResult | None] = {}
    for source, path in tag.upstream.items():
        ids = [execution_id_in(record) for record in find_records(AssetKey(path))]
        views: dict[str, ExecutionView] = {}
        for execution_id in dict.fromkeys(ids):  # one execution may have made several partitions
            view = find_view(execution_id) if execution_id else None
            if view is None:
                warn(
                    f"the upstream asset of step {source!r} has a materialization that no execution in these "
                    f"records made (execution {execution_id or 'unknown'}); materialize it again, or check "
                    "state_dir and database_url"
                )
            else:
                views[view.id] = view
        out[source] = upstream_result(*views.values()) if views else None
    return out


def used_record(
    instance: DagsterInstance, run: DagsterRun, key: AssetKey, latest_id: int | None
) -> EventLogRecord | None:
    """The materialization that a step of this run uses: of its own run, else of the runs it re-executes, else the latest.

    So a step never picks up what another run made meanwhile. `latest_id` is the storage id of the newest one at the
    moment when the step starts.
    """
    for one in _run_and_parents(instance, run):
        record = next(iter(_of_run(instance, one, key)), None)
        if record is not None:
            return record
    if latest_id is None:
        return None
    return next(iter(_by_ids(instance, key, [latest_id])), None)


def used_records(
    instance: DagsterInstance,
    run: DagsterRun,
    key: AssetKey,
    partition_keys: Sequence[str],
    warn: Callable[[str], None],
) -> list[EventLogRecord]:
    """The same for each of these partitions, in their order; those never materialized are left out with a warning."""
    found: dict[str, EventLogRecord] = {}
    for one in _run_and_parents(instance, run):
        for record in _of_run(instance, one, key):
            if record.partition_key in partition_keys:
                found.setdefault(record.partition_key or "", record)
    missing = set(partition_keys) - set(found)
    if missing:
        latest = latest_ids(instance, key, missing)
        for record in _by_ids(instance, key, list(latest.values())):
            found[record.partition_key or ""] = record
    absent = [name for name in partition_keys if name not in found]
    if absent:
        more = f" and {len(absent) - MAX_NAMED} more" if len(absent) > MAX_NAMED else ""
        warn(
            f"{len(absent)} of {len(partition_keys)} partitions of {key.to_user_string()} that this step depends "
            f"on were never materialized: {', '.join(absent[:MAX_NAMED])}{more}"
        )
    return [found[name] for name in partition_keys if name in found]


def latest_ids(
    instance: DagsterInstance, key: AssetKey, partition_keys: Collection[str]
) -> Mapping[str, int]:
    """Storage ids of the newest materializations by partition."""
    return instance.event_log_storage.get_latest_storage_id_by_partition(
        key, DagsterEventType.ASSET_MATERIALIZATION, set(partition_keys)
    )


def _run_and_parents(instance: DagsterInstance, run: DagsterRun) -> Iterator[DagsterRun]:
    one: DagsterRun | None = run
    for _ in range(MAX_PARENT_RUNS):
        if one is None:
            return
        yield one
        parent = one.parent_run_id or one.tags.get(PARENT_RUN_TAG)
        one = instance.get_run_by_id(parent) if parent else None


def _of_run(instance: DagsterInstance, run: DagsterRun, key: AssetKey) -> list[EventLogRecord]:
    """Newest first. A run that did not select the asset is not asked."""
    if run.asset_selection and key not in run.asset_selection:
        return []
    return materializations_of_run(instance, run.run_id, key)


def materializations_of_run(
    instance: DagsterInstance, run_id: str, key: AssetKey
) -> list[EventLogRecord]:
    """Newest first, with the storage ids that the asset's history has."""
    found = instance.get_records_for_run(
        run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION, ascending=False
    ).records
    records = [record for record in found if record.asset_key == key]
    sharded = instance.event_log_storage.is_run_sharded
    return _as_indexed(instance, key, records) if records and sharded else records


def _as_indexed(
    instance: DagsterInstance, key: AssetKey, records: Sequence[EventLogRecord]
) -> list[EventLogRecord]:
    """The same events with the ids that the asset's history has: logs of one file per run count for themselves."""
    wanted = AssetRecordsFilter(
        asset_key=key,
        after_timestamp=records[-1].timestamp - 1,
        before_timestamp=records[0].timestamp + 1,
    )
    out: list[EventLogRecord] = []
    cursor: str | None = None
    while True:
        page = instance.fetch_materializations(wanted, limit=PAGE, cursor=cursor)
        out += [record for record in page.records if record.run_id == records[0].run_id]
        if not page.has_more:
            return out
        cursor = page.cursor


def _by_ids(instance: DagsterInstance, key: AssetKey, ids: list[int]) -> Sequence[EventLogRecord]:
    if not ids:
        return []
    wanted = AssetRecordsFilter(asset_key=key, storage_ids=ids)
    return instance.fetch_materializations(wanted, limit=len(ids)).records


def execution_id_in(record: EventLogRecord) -> str | None:
    materialization = record.asset_materialization
    value = materialization.metadata.get(EXECUTION_ID_KEY) if materialization else None
    return str(value.value) if value is not None else None


def upstream_result(*views: ExecutionView) -> UpstreamResult:
    """Files of all executions, in order; values of the last one that has them."""
    inputs: dict[str, tuple[UpstreamFile, ...]] = {}
    for item in (item for view in views for item in view.inputs):
        uri = f"datum://{item.datum_id}" if item.datum_id else item.uri
        inputs[item.input] = (*inputs.get(item.input, ()), UpstreamFile(name=item.name, uri=uri))
    outputs = [datum for view in views for datum in view.outputs]
    return UpstreamResult(
        outputs=tuple(UpstreamFile(name=datum.name, uri=datum.uri) for datum in outputs),
        inputs=inputs,
        parameters={name: v for view in views for name, v in view.parameters.items()},
        metadata={name: v for view in views for name, v in view.latest_metadata.items()},
    )
