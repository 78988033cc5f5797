"""A run's config with the defaults that Dagster would fill in, from the job's snapshot alone.

Runs are stored with the config as it was written. Dagster resolves it in the process that has the user's code; who
drives a run without that code takes the defaults from the schema in the snapshot. Those include what a job's own
`config=` sets. Values that stand for environment variables (`{"env": "NAME"}`) stay as written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from valohai_dagster.plugin.compat import ConfigSchemaSnapshot, ConfigTypeSnap, JobSnap


def config_with_defaults(job: JobSnap, run_config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config: `ops`, `execution`, `resources`, `loggers`; it is valid, since Dagster made a run of it."""
    root = job.mode_def_snaps[0].root_config_key
    if root is None:
        return dict(run_config)
    schema = job.config_schema_snapshot
    return _resolved(schema, schema.get_config_snap(root), run_config)


def _resolved(schema: ConfigSchemaSnapshot, kind: ConfigTypeSnap, value: Any) -> Any:
    name = kind.kind.name
    if name == "NONEABLE":
        return None if value is None else _resolved(schema, _inner(schema, kind), value)
    if name == "ARRAY":
        return [_resolved(schema, _inner(schema, kind), item) for item in value or ()]
    if name == "MAP":
        inner = _inner(schema, kind)
        return {key: _resolved(schema, inner, item) for key, item in (value or {}).items()}
    if name == "SELECTOR":
        return _selected(schema, kind, value or {})
    if name in ("STRICT_SHAPE", "PERMISSIVE_SHAPE"):
        return _filled(schema, kind, value or {})
    if name == "SCALAR" and kind.scalar_kind is not None and kind.scalar_kind.name == "FLOAT":
        return float(value)
    return value


def _inner(schema: ConfigSchemaSnapshot, kind: ConfigTypeSnap) -> ConfigTypeSnap:
    return schema.get_config_snap(kind.inner_type_key)


def _filled(
    schema: ConfigSchemaSnapshot, kind: ConfigTypeSnap, value: Mapping[str, Any]
) -> dict[str, Any]:
    aliases = kind.field_aliases or {}
    out: dict[str, Any] = {}
    for field in kind.fields or ():
        name = field.name or ""
        written = name if name in value else aliases.get(name, name)
        if written in value:
            found = value[written]
        elif field.default_value_as_json_str is not None:
            found = json.loads(field.default_value_as_json_str)
        else:
            continue
        out[name] = _resolved(schema, schema.get_config_snap(field.type_key), found)
    return {**{k: v for k, v in value.items() if k not in aliases.values()}, **out}


def _selected(
    schema: ConfigSchemaSnapshot, kind: ConfigTypeSnap, value: Mapping[str, Any]
) -> dict[str, Any]:
    """One choice; without one the only field there is, with its default."""
    for field in kind.fields or ():
        name = field.name or ""
        if value and name not in value:
            continue
        default = field.default_value_as_json_str
        found = value.get(name) if value else json.loads(default) if default else None
        return {name: _resolved(schema, schema.get_config_snap(field.type_key), found)}
    return dict(value)
