"""Code versions of assets: what makes an asset stale although its inputs did not change."""

from __future__ import annotations

import hashlib
import json

from valohai_dagster.projects.step import StepDefinition


def code_version_of(step: StepDefinition, commit: str) -> str:
    """`<commit>-<digest of the step>`; an uncommitted tree has its content's digest as commit (T-03).

    `commit` is what really ran, where that may be newer than what was loaded.
    """
    text = json.dumps(step.to_dict()["step"], sort_keys=True, default=str)
    return f"{commit[:13]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
