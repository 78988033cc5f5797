"""What reserved keys in an output's metadata do (O-09)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data.aliases import set_alias
from valohai_dagster.data.datums import add_tags
from valohai_dagster.data.version_effects import reserve_versions
from valohai_dagster.data.version_wishes import TAGS, wishes_of
from valohai_dagster.errors import RefusedError

ALIAS = "valohai.alias"


def apply_sidecar_effects(
    connection: sa.Connection,
    *,
    datum_id: str,
    project_id: str,
    execution_id: str,
    metadata: Mapping[str, Any],
    now: datetime,
) -> list[str]:
    """Tags the datum, moves its alias, and reserves the versions that it is for; returns warnings.

    Wrong values never lose the datum.
    """
    wishes = wishes_of(metadata)
    warnings = [f"datum://{datum_id}: {problem}" for problem in wishes.problems]
    warnings += reserve_versions(
        connection, wishes, project_id=project_id, execution_id=execution_id, now=now
    )
    if TAGS in metadata:
        tags = metadata[TAGS]
        if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
            add_tags(connection, datum_id, tags)
        else:
            warnings.append(
                f"datum://{datum_id}: {TAGS} must be a list of strings, got {_short(tags)}; ignored"
            )
    if ALIAS in metadata:
        try:
            set_alias(
                connection, project_id=project_id, name=metadata[ALIAS], datum_id=datum_id, now=now
            )
        except RefusedError as error:
            warnings.append(f"datum://{datum_id}: {ALIAS}: {error}; ignored")
    return warnings


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
