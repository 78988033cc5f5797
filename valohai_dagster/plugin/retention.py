"""Retention of Dagster's event log, and of everything else in one go: for the command and for the sensor."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import SensorEvaluationContext, SkipReason

from valohai_dagster.errors import ValohaiError
from valohai_dagster.plugin.compat import instance_id

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from valohai_dagster.executions.retention import Done
    from valohai_dagster.executions.retention_rules import Plan
    from valohai_dagster.records.engine import Records
    from valohai_dagster.settings import Settings

log = logging.getLogger(__name__)

RUNS = 200  # whose events are looked at in one go
_BEGINNING = datetime(2000, 1, 1, tzinfo=timezone.utc)


def plan_events(
    instance: DagsterInstance, records: Records, settings: Settings, now: datetime, plan: Plan
) -> None:
    """Adds to the plan what the event log may lose of old runs, an item per run."""
    from valohai_dagster.executions.retention_rules import Item
    from valohai_dagster.plugin.compat.storage import passing_events

    days = settings.retention.events_days
    if days is None:
        return
    runs = _next_runs(instance, records, settings, now - timedelta(days=days))
    for run_id, ended in runs:
        count, size = passing_events(instance, run_id)
        if count:
            age = (
                f"its run changed last {(now - ended).days} days ago, events are kept for {days:g}"
            )
            name = f"{count} rows of run {run_id[:8]}"
            plan.add(Item(kind="events", id=run_id, project="", bytes=size, name=name, why=age))
    if len(runs) >= _runs(settings):
        plan.cursors["events"] = runs[-1][0]


def remove_events(
    instance: DagsterInstance, records: Records, settings: Settings, now: datetime, done: Done
) -> None:
    """Removes them run by run, and remembers how far it came: a cut-off is taken up there."""
    from valohai_dagster.plugin.compat.storage import passing_events
    from valohai_dagster.records.store import set_fact

    days = settings.retention.events_days
    if days is None:
        return
    reached, looked_at = _reached(instance, records)
    runs = _next_runs(instance, records, settings, now - timedelta(days=days))
    for run_id, _ in runs:
        count, size = passing_events(instance, run_id, remove=True)
        done.add("events", size, count)
    if runs:
        last = runs[-1][1]
        same = [run_id for run_id, ended in runs if ended == last]
        if last == reached:
            same = [*looked_at, *same]
        with records.write() as connection:
            set_fact(connection, _fact(instance), {"at": last.isoformat(), "runs": same})
    if len(runs) >= _runs(settings):
        done.cursors["events"] = runs[-1][0]


def _runs(settings: Settings) -> int:
    return min(RUNS, settings.retention.batch)


def _fact(instance: DagsterInstance) -> str:
    return f"retention-events:{instance_id(instance)}"


def _reached(instance: DagsterInstance, records: Records) -> tuple[datetime, list[str]]:
    """Runs that have changed last before this moment have been looked at, and of those that did at it, these."""
    from valohai_dagster.records.store import get_fact

    with records.read() as connection:
        fact = get_fact(connection, _fact(instance))
    return (datetime.fromisoformat(fact["at"]), fact["runs"]) if fact else (_BEGINNING, [])


def _next_runs(
    instance: DagsterInstance, records: Records, settings: Settings, before: datetime
) -> list[tuple[str, datetime]]:
    """Ended runs that have not been looked at, and when they changed last, in that order; at most `_runs`."""
    from valohai_dagster.plugin.compat.storage import finished_runs

    reached, looked_at = _reached(instance, records)
    most = _runs(settings)
    # From that moment on, itself too: many runs may have changed at once, and a batch may end among them.
    found = finished_runs(
        instance, reached - timedelta(microseconds=1), before, most + len(looked_at)
    )
    done = set(looked_at)
    return [(run_id, ended) for run_id, ended in found if run_id not in done][:most]


def run_retention(
    instance: DagsterInstance | None,
    records: Records,
    settings: Settings,
    now: datetime,
    *,
    cursors: dict[str, str] | None = None,
) -> Done:
    """One bounded piece of work; `cursors` of the result go on where it has stopped."""
    from valohai_dagster.executions.retention import carry_out, plan_records
    from valohai_dagster.stores.registry import open_stores

    plan = plan_records(records, settings.retention, now, cursors=cursors)
    forget = _Live(records, settings)
    try:
        done = carry_out(
            records,
            open_stores(settings),
            settings.retention,
            plan,
            now,
            forget_live=forget,
        )
    finally:
        forget.close()
    if instance is not None and (not cursors or "events" in cursors):
        remove_events(instance, records, settings, now, done)
    if any(done.counts.values()):
        told = ", ".join(f"{count} {kind}" for kind, count in done.counts.items() if count)
        log.info("retention removed %s", told, extra={"action": "retention"})
    return done


class _Live:
    """Removes what Redis still has of an attempt's live log; a Redis that is away forgets by itself in a day."""

    def __init__(self, records: Records, settings: Settings) -> None:
        self._records, self._settings = records, settings
        self._client: Any = None
        self._away = False

    def __call__(self, execution_id: str, attempt: int) -> None:
        import redis
        import sqlalchemy as sa

        from valohai_agent.protocol import Keys
        from valohai_dagster.broker.connection import broker_url, make_client
        from valohai_dagster.records import tables as t

        if self._away:
            return
        group = sa.select(t.executions.c.group_name).where(t.executions.c.id == execution_id)
        with self._records.read() as connection:
            name = connection.execute(group).scalar_one()
        try:
            if self._client is None:
                self._client = make_client(broker_url(self._settings))
            self._client.unlink(Keys(self._records.deployment_id).log(name, execution_id, attempt))
        except (redis.RedisError, ValohaiError, OSError) as error:
            self._away = True
            text = "live logs are left to run out: %s"
            log.info(text, error, extra={"action": "retention"})

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def build_retention_sensor(
    *,
    name: str = "retention",
    minimum_interval_seconds: int = 3600,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """Does one batch of what `[retention]` asks for at each tick; starts no run.

    Its cursor is where the next tick goes on.
    """

    def evaluate(context: SensorEvaluationContext) -> SkipReason:
        return tick(context)

    evaluate.__annotations__.clear()  # Dagster does not resolve textual ones
    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description="Removes what the settings under [retention] no longer keep.",
        default_status=default_status,
        asset_selection=None,
    )


def tick(context: SensorEvaluationContext) -> SkipReason:
    """One tick: a batch, and in words what it did."""
    import json

    from valohai_dagster.records.engine import open_records
    from valohai_dagster.settings import load_settings

    settings = load_settings()
    records = open_records(settings)
    try:
        cursors = json.loads(context.cursor) if context.cursor else {}
        now = datetime.now(timezone.utc)
        done = run_retention(context.instance, records, settings, now, cursors=cursors)
    finally:
        records.close()
    context.update_cursor(json.dumps(done.cursors))
    removed = ", ".join(f"{count} {kind}" for kind, count in done.counts.items() if count)
    problems = (
        f"; {len(done.problems)} could not be removed: {done.problems[0]}" if done.problems else ""
    )
    return SkipReason(f"removed {removed or 'nothing'}{problems}")
