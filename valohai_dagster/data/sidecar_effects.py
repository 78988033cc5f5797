"""What reserved keys in an output's metadata do (O-09)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from valohai_dagster.data.aliases import set_alias
from valohai_dagster.data.datums import add_tags
from valohai_dagster.errors import RefusedError

TAGS = "valohai.tags"
ALIAS = "valohai.alias"
_UNSUPPORTED = ("valohai.dataset-versions", "valohai.model-versions")


def apply_sidecar_effects(
    connection: sa.Connection,
    *,
    datum_id: str,
    project_id: str,
    metadata: Mapping[str, Any],
    now: datetime,
) -> list[str]:
    """Tags the datum and moves its alias; returns warnings. Wrong values never lose the datum."""
    warnings = [
        f"datum://{datum_id}: {key} in its metadata is not supported yet, no version was made"
        for key in _UNSUPPORTED
        if key in metadata
    ]
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
