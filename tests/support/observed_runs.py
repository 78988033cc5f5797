"""What a Dagster instance knows of its runs, as plain data that two instances can be compared by.

Whatever a person or a sensor can see is taken: every field of every event, runs, step statistics, assets, checks.
Ids are replaced by what they stand for, so that "the input came from that output" is compared, not the number. What
is left out stands in `Exclusions`, which a test states with its reasons.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa
from dagster import (
    AssetKey,
    AssetRecordsFilter,
    DagsterInstance,
    EventLogRecord,
    RunRecord,
)
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from dagster._core.storage.partition_status_cache import get_partition_subsets
from dagster._core.workspace.context import WorkspaceRequestContext
from dagster_shared.serdes import serialize_value

from valohai_dagster.records.engine import Records
from valohai_dagster.records.tables import datums, executions

MANY = 1_000  # records of one query; tests make a few dozen
POINTER = "dagster/input_event_pointer/"
WORDING = "<wording>"
LINE = 120  # characters of a line in a diff
Json = Any
AtOnce: TypeAlias = Literal["", "steps", "runs"]


Reasons: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Exclusions:
    """What is not compared; each entry with its reason, but for `texts`."""

    kinds: Reasons  # events of these types
    kept: Reasons = field(default_factory=dict)  # those with these messages count all the same
    wording: Reasons  # message and metadata of events of these types
    lines: Reasons  # log lines that match these expressions
    fields: Reasons  # these keys, wherever they stand
    entries: Reasons  # metadata entries with these labels; a trailing * stands for the rest
    texts: Mapping[str, str]  # name -> expression; what it matches in a text becomes <name>


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Runs in the order of their creation, and the state they left."""

    runs: Sequence[Json]
    assets: Mapping[str, Json]
    checks: Mapping[str, Json]
    pools: Mapping[str, Json] = field(default_factory=dict)

    def lines(self, *, at_once: AtOnce = "") -> list[str]:
        data = {"assets": self.assets, "checks": self.checks, "pools": self.pools}
        runs = [_per_step(run) if at_once else run for run in self.runs]
        if at_once == "runs":
            runs, data = _without_pointers(runs), _without_pointers(data)
            data["assets"] = {key: _without_history(one) for key, one in data["assets"].items()}
        return list(_written({"runs": runs, **data}))


def _written(value: Json, indent: int = 0, name: str = "") -> Iterator[str]:
    """JSON in which what fits on a line is on one, so that a difference is easy to read."""
    start = " " * indent + name
    text = json.dumps(value, sort_keys=True)
    if len(start) + len(text) <= LINE or not isinstance(value, (dict, list)):
        yield start + text
        return
    yield start + ("{" if isinstance(value, dict) else "[")
    items = sorted(value.items()) if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield from _written(item, indent + 1, f"{key}: " if isinstance(value, dict) else "")
    yield " " * indent + ("}" if isinstance(value, dict) else "]")


def differences(engine: Observed, other: Observed, *, at_once: AtOnce = "") -> str:
    """A diff for people; empty when both are the same.

    Where `steps` run at once, only the order of events within each step counts; where `runs` do, which of them was the
    last to make an asset does not count either.
    """
    left, right = engine.lines(at_once=at_once), other.lines(at_once=at_once)
    return "\n".join(difflib.unified_diff(left, right, "engine", "other", n=4, lineterm=""))


def _without_pointers(data: Json) -> Json:
    """Of partitions, Dagster points to the newest one, whichever the step used."""
    if isinstance(data, dict):
        return {
            key: _without_pointers(item)
            for key, item in data.items()
            if not key.startswith(POINTER)
        }
    return [_without_pointers(item) for item in data] if isinstance(data, list) else data


def _without_history(asset: Json) -> Json:
    kept = {key: value for key, value in asset.items() if not key.startswith(("last_", "planned_"))}
    lists = {key: sorted(kept[key], key=str) for key in ("materializations", "tags")}
    return {**kept, **lists}


def _per_step(run: Json) -> Json:
    """The run with its events by step; those of no step keep their own order."""
    events: dict[str, list[Json]] = {}
    for event in run["events"]:
        events.setdefault(str(event["step_key"]), []).append(event)
    return {**run, "events": events}


def observe(
    instance: DagsterInstance,
    request: WorkspaceRequestContext,
    records: Records,
    exclusions: Exclusions,
) -> Observed:
    """Everything that the instance has, so use it on one that a test has to itself."""
    runs = sorted(instance.get_run_records(limit=MANY), key=lambda record: record.storage_id)
    names = _names(instance, runs, records)
    plain = Plain(exclusions, names)
    resolver = CachingStaleStatusResolver(instance, request.asset_graph, request)
    keys = sorted(request.asset_graph.materializable_asset_keys)
    return Observed(
        runs=[plain.of(_run(instance, record, exclusions)) for record in runs],
        assets={
            key.to_user_string(): plain.of(
                {
                    **_asset(instance, key, resolver),
                    "partitions": _partitions(instance, request, key, resolver),
                }
            )
            for key in keys
        },
        checks={
            str(key): plain.of(_check_history(instance, key))
            for key in sorted(request.asset_graph.asset_check_keys, key=str)
        },
        pools={
            pool: _pool(instance, pool)
            for pool in sorted(instance.event_log_storage.get_concurrency_keys())
        },
    )


# -- what there is ---------------------------------------------------------------------------------------------


def _run(instance: DagsterInstance, record: RunRecord, exclusions: Exclusions) -> Json:
    run = record.dagster_run
    found = instance.get_records_for_run(run.run_id, limit=MANY).records
    stats = instance.get_run_stats(run.run_id)
    return {
        "run": _serialized(run),
        "has_start_time": record.start_time is not None,
        "has_end_time": record.end_time is not None,
        "counts": [
            stats.steps_succeeded,
            stats.steps_failed,
            stats.materializations,
            stats.expectations,
        ],
        "steps": {
            step.step_key: {
                "status": step.status.value if step.status else None,
                "attempts": step.attempts,
                "finished_attempts": len(step.attempts_list),
                "has_start_time": step.start_time is not None,
                "has_end_time": step.end_time is not None,
                "materializations": len(step.materialization_events),
            }
            for step in instance.get_run_step_stats(run.run_id)
        },
        "events": list(_events(found, exclusions)),
        "logs": _logs(instance, found) if "LOGS_CAPTURED" not in exclusions.kinds else {},
    }


def _logs(instance: DagsterInstance, records: Sequence[EventLogRecord]) -> Json:
    """What the stdout and stderr tabs show, per step and try."""
    out: dict[str, list[Json]] = {}
    for record in records:
        event = record.event_log_entry.dagster_event
        if event is None or event.event_type_value != "LOGS_CAPTURED":
            continue
        data = event.logs_captured_data
        for step in data.step_keys or ():
            key = [record.run_id, "compute_logs", data.file_key]
            log = instance.compute_log_manager.get_log_data(key)
            streams = {"stdout": log.stdout, "stderr": log.stderr}
            texts = {name: (content or b"").decode() for name, content in streams.items()}
            out.setdefault(step, []).append(texts)
    return out


def _events(records: Sequence[EventLogRecord], exclusions: Exclusions) -> Iterator[Json]:
    for record in records:
        entry = record.event_log_entry
        event = entry.dagster_event
        if event is not None:
            skip = (
                event.event_type_value in exclusions.kinds and entry.message not in exclusions.kept
            )
        else:
            skip = any(re.match(line, entry.user_message) for line in exclusions.lines)
        if skip:
            continue
        shown = {**_serialized(entry), "shown_message": entry.message}
        if event is not None and event.event_type_value in exclusions.wording:
            shown.update(user_message=WORDING, shown_message=WORDING)
            shown["dagster_event"]["message"] = WORDING
            shown["dagster_event"]["event_specific_data"]["metadata_entries"] = []
        yield shown


def _asset(instance: DagsterInstance, key: AssetKey, resolver: CachingStaleStatusResolver) -> Json:
    found = instance.get_asset_records([key])
    entry = found[0].asset_entry if found else None
    return {
        "status": resolver.get_status(key).value,
        "causes": [
            [cause.category.value, cause.reason, cause.asset_key.to_user_string()]
            for cause in resolver.get_stale_root_causes(key)
        ],
        "last_run": entry.last_run_id if entry else None,
        "planned_run": entry.last_planned_materialization_run_id if entry else None,
        "last_materialization": _event_of(entry.last_materialization_record) if entry else None,
        "last_observation": _event_of(entry.last_observation_record) if entry else None,
        "materializations": [
            [record.run_id, record.partition_key, record.event_log_entry.step_key]
            for record in _materializations(instance, key)
        ],
        "tags": [
            dict(sorted(tags.items()))
            for tags in (
                record.asset_materialization.tags or {}
                for record in _materializations(instance, key)
                if record.asset_materialization is not None
            )
        ],
    }


def _partitions(
    instance: DagsterInstance,
    request: WorkspaceRequestContext,
    key: AssetKey,
    resolver: CachingStaleStatusResolver,
) -> Json:
    """What the bar of an asset's partitions shows, and each materialized one's staleness."""
    definition = request.asset_graph.get(key).partitions_def
    if definition is None:
        return None
    context = LoadingContextForTest(instance)
    loading = get_partition_subsets(instance, context, key, instance, definition)
    materialized, failed, in_progress = (
        sorted(subset.get_partition_keys()) if subset else [] for subset in asyncio.run(loading)
    )
    return {
        "materialized": {name: resolver.get_status(key, name).value for name in materialized},
        "failed": failed,
        "in_progress": in_progress,
    }


def _materializations(instance: DagsterInstance, key: AssetKey) -> Sequence[EventLogRecord]:
    wanted = AssetRecordsFilter(asset_key=key)
    return instance.fetch_materializations(wanted, limit=MANY, ascending=True).records


def _event_of(record: EventLogRecord | None) -> Json:
    return _serialized(record.event_log_entry.dagster_event) if record is not None else None


def _check_history(instance: DagsterInstance, key: Any) -> Json:
    history = instance.event_log_storage.get_asset_check_execution_history(key, limit=MANY)
    return [
        {
            "run": record.run_id,
            "status": record.status.value,
            "partition": record.partition,
            "event": _serialized(record.event.dagster_event) if record.event else None,
        }
        for record in history
    ]


def _pool(instance: DagsterInstance, pool: str) -> Json:
    info = instance.event_log_storage.get_concurrency_info(pool)
    return {
        "slots": info.slot_count,
        "taken": len(info.claimed_slots),
        "waiting": len(info.pending_steps),
    }


def _serialized(value: Any) -> Json:
    return json.loads(serialize_value(value))


# -- what ids stand for ----------------------------------------------------------------------------------------


def _names(
    instance: DagsterInstance, runs: Sequence[RunRecord], records: Records
) -> dict[str, str]:
    """Run, execution and datum ids, and per asset the storage ids that provenance tags point to."""
    names = {record.dagster_run.run_id: f"run-{n}" for n, record in enumerate(runs, 1)}
    with records.read() as connection:
        made = connection.execute(sa.select(executions)).mappings().all()
        files = connection.execute(sa.select(datums)).mappings().all()
    for row in made:
        name = f"{names.get(row['run_id'], 'no-run')}.{row['step_key']}.{row['retry_number']}"
        names[row["id"]] = f"<execution {name}>"
        names[f"#{row['counter']}"] = f"<number of execution {name}>"
    for row in files:
        names[row["id"]] = f"<datum {row['name']} of {names.get(row['execution_id'])}>"
    for key in instance.all_asset_keys():
        for record in _materializations(instance, key):
            what = f"{key.to_user_string()}[{record.partition_key or ''}]"
            name = f"<materialization of {what} in {names.get(record.run_id)}>"
            names[f"{POINTER}{key.to_user_string()}={record.storage_id}"] = name
            names[f"storage_id={record.storage_id}"] = name  # of the target of a check
    return names


class Plain:
    """Data without what is excluded, with names in the place of ids."""

    def __init__(self, exclusions: Exclusions, names: Mapping[str, str]) -> None:
        self._exclusions, self._names = exclusions, names
        ids = sorted((name for name in names if "=" not in name), key=len, reverse=True)
        self._ids = re.compile("|".join(rf"{re.escape(name)}(?!\w)" for name in ids) or r"(?!)")
        self._texts = [(re.compile(text), name) for name, text in exclusions.texts.items()]

    def of(self, value: Json) -> Json:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self.of(item) for item in value if not self._left_out(item)]
        if isinstance(value, dict):
            return {
                self._text(key): self._names.get(f"{key}={item}") or self.of(item)
                for key, item in value.items()
                if key not in self._exclusions.fields
            }
        return value

    def _left_out(self, item: Json) -> bool:
        if not isinstance(item, dict) or item.get("__class__") != "EventMetadataEntry":
            return False
        label = str(item["label"])
        return any(
            label == known or (known.endswith("*") and label.startswith(known[:-1]))
            for known in self._exclusions.entries
        )

    def _text(self, text: str) -> str:
        text = self._ids.sub(lambda found: self._names[found[0]], text)
        for expression, name in self._texts:
            text = expression.sub(f"<{name}>", text)
        return text
