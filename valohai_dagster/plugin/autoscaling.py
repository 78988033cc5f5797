"""A sensor whose ticks tell, in Dagster's UI, what was decided about machines and why; each also has them looked at."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import dagster as dg
from dagster import SensorEvaluationContext, SkipReason

from valohai_dagster.errors import ValohaiError

if TYPE_CHECKING:
    from valohai_dagster.capacity.reading import Line
    from valohai_dagster.executions.capacity_state import CapacityState
    from valohai_dagster.records.engine import Records
    from valohai_dagster.settings import Settings

LINES = 500  # of one tick; the next one goes on
SHOWN = 10  # of them, the newest, in the one line that the list of ticks shows
FIRST = 20  # lines from before the first tick
OVERLAP = 100  # ids before the last one among which lines may still appear
BAD = frozenset({"trouble", "orphan", "lost"})


def valohai_autoscaling_sensor(
    *,
    groups: Sequence[str] | None = None,
    name: str = "autoscaling",
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """Tells what has happened to the machines of these groups since the last tick, by default of all that have some.

    Each tick has them looked at as well. Scaling does not need it: conductors do that by themselves, at once when
    something is queued. It starts no run.
    """

    def evaluate(context: SensorEvaluationContext) -> SkipReason:
        return tick(context, groups)

    evaluate.__annotations__.clear()  # Dagster does not resolve textual ones
    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        minimum_interval_seconds=minimum_interval_seconds,
        description="Which machines were started and ended for which group, and why.",
        default_status=default_status,
        asset_selection=None,
    )


def tick(context: SensorEvaluationContext, groups: Sequence[str] | None = None) -> SkipReason:
    """One tick: every line since the last one goes to its log, the newest to the list of ticks."""
    from valohai_dagster.records.engine import open_records
    from valohai_dagster.settings import load_settings
    from valohai_dagster.settings_groups import CloudGroupSettings

    settings = load_settings()
    names = [
        name
        for name, group in settings.groups.items()
        if isinstance(group, CloudGroupSettings) and (groups is None or name in groups)
    ]
    if not names:
        return SkipReason("no worker group of the settings has machines that come and go")
    records = open_records(settings)
    try:
        lines, cursor = _news(records, context.cursor, names)
        states, problem = _look(settings, records, names)
    finally:
        records.close()
    for line in lines:
        level = logging.WARNING if line.kind in BAD else logging.INFO
        context.log.log(level, _text(line))
    now = datetime.now(timezone.utc)
    standing = [_standing(name, states.get(name), now) for name in names]
    for name, text in zip(names, standing, strict=True):
        state = states.get(name)
        well = state is not None and state.trouble is None
        context.log.log(logging.INFO if well else logging.WARNING, text)
    if problem:
        context.log.warning(problem)
    context.update_cursor(cursor)
    return SkipReason("; ".join([*standing, *([problem] if problem else []), *_short(lines)]))


def _news(records: Records, cursor: str | None, names: Sequence[str]) -> tuple[list[Line], str]:
    """Lines that no tick has told yet, and the cursor for the next one.

    Of two that are written at the same time the one with the smaller id may appear later: so the cursor also has which
    of the last ids were there.
    """
    from valohai_dagster.capacity.reading import history, newest_line

    known = json.loads(cursor) if cursor else None
    with records.read() as conn:
        newest = newest_line(conn)
        if known is not None and known["line"] > newest:  # the records are others now
            known = None
        after = known["line"] - OVERLAP if known else newest - LINES
        lines = history(conn, after=after, limit=LINES)
    reached = lines[-1].id if lines else newest
    there = [line.id for line in lines if line.id > reached - OVERLAP]
    told = set(known.get("there", ())) if known else set()
    new = [line for line in lines if line.group in names and line.id not in told]
    return new if known else new[-FIRST:], json.dumps({"line": reached, "there": there})


def _look(
    settings: Settings, records: Records, names: Sequence[str]
) -> tuple[dict[str, CapacityState], str | None]:
    """Has the groups looked at, and tells how they stood before; or why that could not be done."""
    import redis

    from valohai_agent.protocol import Keys
    from valohai_dagster.broker.connection import broker_url, make_client
    from valohai_dagster.executions.capacity_state import kick, read_state

    found: dict[str, CapacityState] = {}
    keys, client = Keys(records.deployment_id), make_client(broker_url(settings))
    try:
        for name in names:
            state = read_state(client, keys, name)
            if state is not None:
                found[name] = state
            kick(client, keys, name)
    except (redis.RedisError, OSError, ValohaiError) as error:
        return found, f"Redis is away, so nobody could be asked to look: {error}"
    finally:
        client.close()
    return found, None


def _standing(name: str, state: CapacityState | None, now: datetime) -> str:
    if state is None:
        return (
            f"{name}: no conductor looks after its machines; `valohai-dagster doctor` checks them"
        )
    age = (now - state.at).total_seconds()
    lately = f" ({age:.0f} s ago)" if age >= 60 else ""
    trouble = f" - {state.trouble}" if state.trouble else ""
    disabled = "" if state.enabled else ", disabled"
    return f"{name}: {state.summary}{disabled}{trouble}{lately}"


def _short(lines: Sequence[Line]) -> list[str]:
    """The newest of them, newest first."""
    told = [_text(line) for line in reversed(lines[-SHOWN:])]
    more = len(lines) - len(told)
    return [*told, *([f"and {more} more in this tick's log"] if more > 0 else [])]


def _text(line: Line) -> str:
    about = f" [{line.machine_id}]" if line.machine_id else ""
    return f"{line.at:%H:%M:%S} {line.group} {line.kind}{about}: {line.text}"
