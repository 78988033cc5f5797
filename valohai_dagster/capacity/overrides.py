"""Settings of groups that were changed at run time: over those of the file, kept in the records (`vh_groups`).

Every conductor and every check at launch reads them when it needs them, so a change counts at once and survives restarts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from difflib import get_close_matches
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from valohai_dagster.errors import RefusedError
from valohai_dagster.records.capacity_tables import group_overrides
from valohai_dagster.settings_groups import AnyGroupSettings

G = TypeVar("G", bound=AnyGroupSettings)

# What may change while machines are there. Anything else makes other machines, and belongs in the file.
CHANGEABLE = (
    "enabled",
    "min_machines",
    "max_machines",
    "scale_down_grace_seconds",
    "stop_when_idle",
    "destroy_stopped_after_seconds",
    "boot_seconds",
    "spot",
    "on_demand_fallback",
    "owner",
    "per_user_quota",
    "team_quotas",
    "price_per_hour",
    "spot_price_per_hour",
)


def read_overrides(conn: sa.Connection, group: str) -> dict[str, Any]:
    """What was changed of this group, by name of the setting; empty when it is as in the file."""
    query = sa.select(group_overrides.c.settings).where(group_overrides.c.group_name == group)
    return dict(conn.execute(query).scalar_one_or_none() or {})


def effective(conn: sa.Connection, name: str, group: G) -> G:
    """The group as it is now: the file's settings with what was changed since and fits them."""
    return fitted(name, group, read_overrides(conn, name))[0]


def fitted(name: str, group: G, values: Mapping[str, Any]) -> tuple[G, dict[str, str]]:
    """The group with those changes that it can have, and why it cannot have the others, by name of the setting.

    The file may have made one impossible since, such as `max_machines` below a new `min_machines`.
    """
    with suppress(RefusedError):
        return with_overrides(name, group, values), {}
    now, kept, refused = group, dict[str, Any](), dict[str, str]()
    for key in (*values, *values):  # twice: one may be possible only with another
        if key not in kept:
            try:
                now = with_overrides(name, group, {**kept, key: values[key]})
            except RefusedError as error:
                refused[key] = str(error)
            else:
                kept[key] = values[key]
                refused.pop(key, None)
    return now, refused


def with_overrides(name: str, group: G, values: Mapping[str, Any]) -> G:
    """Raises RefusedError for settings that the group does not have or that do not fit together."""
    if not values:
        return group
    possible = changeable(group)
    for key in values:
        if key not in type(group).model_fields:
            close = get_close_matches(key, possible, n=1)
            more = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(possible)}"
            raise RefusedError(f"group {name} has no setting {key!r}{more}")
        if key not in possible:
            raise RefusedError(
                f"group {name}: {key!r} cannot be changed at run time; that can be done with {', '.join(possible)}. "
                f"Others are set in valohai.toml under [groups.{name}]"
            )
    kept = {key: getattr(group, key) for key in group.model_fields_set}
    try:
        return type(group).model_validate({**kept, **values})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}".removeprefix(
                ": "
            )
            for one in error.errors(include_url=False, include_input=False)
        )
        raise RefusedError(f"group {name}: {problems}") from None


def changeable(group: AnyGroupSettings) -> tuple[str, ...]:
    """Names of the settings of this kind of group that may be changed at run time."""
    return tuple(key for key in CHANGEABLE if key in type(group).model_fields)


def write_overrides(
    conn: sa.Connection, name: str, values: Mapping[str, Any], now: datetime
) -> None:
    """Replaces all changes of the group; without any it is again as in the file."""
    mine = group_overrides.c.group_name == name
    conn.execute(group_overrides.delete().where(mine))
    if values:
        plain = TypeAdapter(dict[str, Any]).dump_python(dict(values), mode="json")
        conn.execute(group_overrides.insert().values(group_name=name, settings=plain, mtime=now))
