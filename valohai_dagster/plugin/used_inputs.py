"""What an execution really took from each asset that it depends on, where that is not what Dagster would think.

Dagster's provenance names the newest version of every upstream asset. An external source may have changed between its
last observation and the download, and a launch may name a file of an earlier execution: then the provenance has to name
those. Shared by op processes and the run driver, once the execution has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dagster import (
    AssetKey,
    AssetObservation,
    AssetRecordsFilter,
    DagsterInstance,
    EventLogRecord,
    MetadataValue,
)

from valohai_dagster.data.observation import version_used
from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.executions.views import Origin
from valohai_dagster.plugin.compat import (
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    disable_dagster_warnings,
    extract_data_version_from_entry,
    version_of_records,
)
from valohai_dagster.plugin.step_tag import StepTag
from valohai_dagster.plugin.upstream_results import execution_id_in, materializations_of_run

SEARCHED = 50  # newest observations of a source, for the one with a version
FindOrigins = Callable[[Collection[str]], Mapping[str, Origin]]


@dataclass(frozen=True, kw_only=True)
class Used:
    """One upstream asset: the data version that was used, and the event that it came with if there is one."""

    key: AssetKey
    version: str
    record: EventLogRecord | None

    @property
    def storage_id(self) -> int | None:
        return self.record.storage_id if self.record is not None else None


def unseen(instance: DagsterInstance, tag: StepTag, view: ExecutionView) -> list[AssetObservation]:
    """Observations to write: of sources that nobody has seen yet with the content that was used.

    None where a newer observation is there: it may have seen what came after the use.
    """
    out: list[AssetObservation] = []
    used_at = _used_at(view)
    for key, version in _versions(tag, view).items():
        newest = next(iter(_observations(instance, key, limit=1)), None)
        if newest is None or (
            _version(newest) != version and newest.timestamp <= used_at.timestamp()
        ):
            out.append(_observation(key, version, tag, view))
    return out


def used_sources(instance: DagsterInstance, tag: StepTag, view: ExecutionView) -> list[Used]:
    """What was used of the external sources; call it when the observations of `unseen` are written."""
    return [
        Used(
            key=key,
            version=version,
            record=next(
                (one for one in _observations(instance, key) if _version(one) == version), None
            ),
        )
        for key, version in _versions(tag, view).items()
    ]


def used_upstream(
    instance: DagsterInstance,
    tag: StepTag,
    view: ExecutionView,
    find_origins: FindOrigins,
    *,
    given: Collection[str],
    partitioned: Callable[[AssetKey], bool],
) -> list[Used]:
    """Upstream assets whose files came from the executions that a launch named, not from the newest.

    `given`: inputs that the launch has values for. Of several executions of one asset the last counts. Assets with
    partitions are left to Dagster.
    """
    fed: dict[str, set[str]] = {}
    for edge in tag.edges:
        if edge.target_type == "input" and edge.target_key in given:
            fed.setdefault(edge.source_step, set()).add(edge.target_key)
    ids = {item.datum_id for item in view.inputs if item.datum_id}
    origins = find_origins(ids) if ids and fed else {}
    out: list[Used] = []
    for step, inputs in fed.items():
        key = AssetKey(tag.upstream[step])
        if partitioned(key):
            continue
        used = [origins.get(i.datum_id or "") for i in view.inputs if i.input in inputs]
        mine = {o.execution_id: o for o in used if o and o.asset_key == "/".join(key.path)}
        records = [record for o in mine.values() for record in _made_by(instance, o, key)]
        version = version_of_records(records, partitioned=False) if records else None
        if version is not None:
            newest = max(records, key=lambda record: record.storage_id)
            out.append(Used(key=key, version=version.value, record=newest))
    return out


def _made_by(instance: DagsterInstance, origin: Origin, key: AssetKey) -> Sequence[EventLogRecord]:
    if origin.run_id is None:
        return ()
    records = materializations_of_run(instance, origin.run_id, key)
    return [record for record in records if execution_id_in(record) == origin.execution_id][:1]


def _versions(tag: StepTag, view: ExecutionView) -> dict[AssetKey, str]:
    """The version that was used of each source; those that a launch replaced are left out."""
    out: dict[AssetKey, str] = {}
    for source in tag.sources:
        files = [i for i in view.inputs if (i.input, i.asked) == (source.input, source.asked)]
        version = version_used(files, is_pattern=source.is_pattern)
        if version is not None:
            out.setdefault(AssetKey(source.key), version)
    return out


def _used_at(view: ExecutionView) -> datetime:
    """When the inputs were in place."""
    ends = [span.ended_at for span in view.phases if span.phase == "downloading"]
    return max(ends, default=view.started_at or view.ctime)


def _observation(
    key: AssetKey, version: str, tag: StepTag, view: ExecutionView
) -> AssetObservation:
    source = next(one for one in tag.sources if one.key == tuple(key.path))
    files = [i for i in view.inputs if (i.input, i.asked) == (source.input, source.asked)]
    metadata: dict[str, MetadataValue[Any]] = {
        "uri": MetadataValue.text(source.asked),
        "version": MetadataValue.text(version),
        "count": MetadataValue.int(len(files)),
        "used_by": MetadataValue.text(f"execution #{view.counter} of step {view.step}"),
    }
    if all(item.size is not None for item in files):
        metadata["size"] = MetadataValue.int(sum(item.size or 0 for item in files))
    tags = {DATA_VERSION_TAG: version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    with disable_dagster_warnings():
        return AssetObservation(asset_key=key, metadata=metadata, tags=tags)


def _observations(
    instance: DagsterInstance, key: AssetKey, limit: int = SEARCHED
) -> Sequence[EventLogRecord]:
    """Newest first."""
    return instance.fetch_observations(AssetRecordsFilter(asset_key=key), limit=limit).records


def _version(record: EventLogRecord) -> str | None:
    found = extract_data_version_from_entry(record.event_log_entry)
    return found.value if found else None
