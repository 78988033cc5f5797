"""A sensor that observes what steps read from outside and tells Dagster of what has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg
from dagster import AssetKey, SensorEvaluationContext, SensorResult, SkipReason

from valohai_dagster.errors import SourceUnreadable
from valohai_dagster.plugin.compat import (
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    disable_dagster_warnings,
    extract_data_version_from_entry,
)

if TYPE_CHECKING:
    from dagster import AssetObservation, DagsterInstance

    from valohai_dagster.data.external import ExternalSource
    from valohai_dagster.data.observation import Seen

NAMED = 10  # problems in one tick's reason


def build_observe_sensor(
    *,
    projects: Sequence[str] | None = None,
    name: str = "observe_external",
    minimum_interval_seconds: int = 300,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """Looks at the external sources of these projects, by default of all that this code location has loaded.

    Only what has changed since its last observation becomes an event, so that a quiet source costs no rows. It starts
    no run: the tick itself looks, through the stores of the settings.
    """

    def evaluate(context: SensorEvaluationContext) -> SensorResult | SkipReason:
        return look_for_changes(context.instance, projects)

    evaluate.__annotations__.clear()  # Dagster does not resolve textual ones
    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description="Observes what steps read from outside: buckets, web servers, aliases.",
        default_status=default_status,
        asset_selection=None,
    )


def look_for_changes(
    instance: DagsterInstance, projects: Sequence[str] | None = None
) -> SensorResult | SkipReason:
    """One tick. What cannot be looked at is named in the reason and keeps nothing else from being seen."""
    from valohai_dagster.plugin.external import known_sources, look

    events: list[AssetObservation] = []
    problems: list[str] = []
    count = 0
    for project, sources in known_sources().items():
        if projects is not None and project not in projects:
            continue
        for source, seen in look(project, list(sources.values())):
            count += 1
            if isinstance(seen, SourceUnreadable):
                problems.append(str(seen))
            elif _is_new(instance, source, seen):
                events.append(_observation(source, seen))
    more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    told = "; ".join(problems[:NAMED]) + more
    if events:
        return SensorResult(asset_events=events, skip_reason=SkipReason(told) if told else None)
    return SkipReason(told or f"{count} external sources, none has changed")


def _is_new(instance: DagsterInstance, source: ExternalSource, seen: Seen) -> bool:
    records = instance.fetch_observations(AssetKey(source.path), limit=1).records
    known = extract_data_version_from_entry(records[0].event_log_entry) if records else None
    return known is None or known.value != seen.version


def _observation(source: ExternalSource, seen: Seen) -> AssetObservation:
    from valohai_dagster.plugin.external import metadata_of

    tags = {DATA_VERSION_TAG: seen.version, DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
    with disable_dagster_warnings():
        return dg.AssetObservation(
            asset_key=AssetKey(source.path), metadata=metadata_of(source, seen), tags=tags
        )
