"""`valohai_job`: a job of steps that says which engine has to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from valohai_dagster.plugin.step_tag import DAGSTER_ENGINE, ENGINE_TAG

if TYPE_CHECKING:
    from collections.abc import Set

    UnresolvedAssetJob = Any  # what dg.define_asset_job returns has no public name


def valohai_job(
    name: str,
    selection: Any = None,
    *,
    hooks: Set[dg.HookDefinition] | None = None,
    op_retry_policy: dg.RetryPolicy | None = None,
    tags: Mapping[str, object] | None = None,
    run_tags: Mapping[str, object] | None = None,
    **options: Any,
) -> UnresolvedAssetJob:
    """As `dagster.define_asset_job`, with the same arguments; hooks fire and `op_retry_policy` counts.

    Both live in user code alone: the conductor, which drives runs without it, cannot see them. A job that has one
    is tagged `valohai/engine: dagster`, so that Dagster's own engine runs it, with one process per run. A retry
    policy of `load_valohai_project` needs no such job.
    """
    if hooks or op_retry_policy is not None:
        mark = {ENGINE_TAG: DAGSTER_ENGINE}
        tags = {**(tags or {}), **mark}
        run_tags = {**run_tags, **mark} if run_tags is not None else None
    return dg.define_asset_job(
        name,
        selection,
        hooks=hooks,
        op_retry_policy=op_retry_policy,
        tags=tags,
        run_tags=run_tags,
        **options,
    )
