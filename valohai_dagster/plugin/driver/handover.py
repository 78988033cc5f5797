"""What a launcher tells the conductor of a run: facts that the conductor cannot read from Dagster's storage.

A run itself is read from the storage by its id. Partition mappings and definitions live in code locations only, so
the launcher, which has a workspace, works out here which partitions each step makes and depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dagster import AssetKey, DagsterInstance, DagsterRun, MultiPartitionKey
from pydantic import BaseModel, ConfigDict, Field

from valohai_dagster.plugin.compat.engine import (
    BaseWorkspaceRequestContext,
)
from valohai_dagster.plugin.compat.partitions import (
    asset_partitions,
    parent_partitions,
)
from valohai_dagster.plugin.partitions import NO_PARTITIONS, PARTITION_TAG, RunPartitions

RANGE_START_TAG = "dagster/asset_partition_range_start"


class PartitionKey(BaseModel):
    model_config = ConfigDict(frozen=True)

    key: str
    dimensions: dict[str, str] = Field(default_factory=dict)


class AssetHandOver(BaseModel):
    """Of one asset that the run makes."""

    model_config = ConfigDict(frozen=True)

    keys: list[PartitionKey] = Field(default_factory=list)
    parents: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Partitions of each partitioned upstream asset (user string of its key).",
    )


class HandOver(BaseModel):
    """Kept in `vh_runs`; holds no secrets."""

    model_config = ConfigDict(frozen=True)

    v: int = 1
    run_id: str
    instance_id: str
    assets: dict[str, AssetHandOver] = Field(default_factory=dict)  # by the key's user string

    def _of(self, path: Sequence[str]) -> AssetHandOver:
        return self.assets.get(AssetKey(list(path)).to_user_string()) or AssetHandOver()

    def partitions_of(self, path: Sequence[str]) -> RunPartitions:
        keys = self._of(path).keys
        if not keys:
            return NO_PARTITIONS
        dimensions = keys[0].dimensions if len(keys) == 1 else {}
        return RunPartitions(keys=tuple(item.key for item in keys), dimensions=dimensions)

    def partition_keys(self, path: Sequence[str]) -> list[str]:
        """Keys of several dimensions as Dagster's own type, which knows its parts."""
        return [
            MultiPartitionKey(item.dimensions) if item.dimensions else item.key
            for item in self._of(path).keys
        ]

    def parent_partitions(self, path: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return self._of(path).parents


def freeze(
    instance: DagsterInstance,
    run: DagsterRun,
    instance_id: str,
    assets: Mapping[str, Sequence[Sequence[str]]],
    workspace: BaseWorkspaceRequestContext | None,
) -> HandOver:
    """`assets`: user string of the key of each asset that the run makes -> its parents' keys."""
    frozen: dict[str, AssetHandOver] = {}
    if workspace is not None and assets and _may_have_partitions(run, workspace, assets):
        for name, parents in assets.items():
            frozen[name] = _freeze_asset(instance, run, name, parents, workspace)
    return HandOver(
        run_id=run.run_id,
        instance_id=instance_id,
        assets={name: item for name, item in frozen.items() if item.keys or item.parents},
    )


def _may_have_partitions(
    run: DagsterRun,
    workspace: BaseWorkspaceRequestContext,
    assets: Mapping[str, Sequence[Sequence[str]]],
) -> bool:
    if PARTITION_TAG in run.tags or RANGE_START_TAG in run.tags:
        return True
    graph = workspace.asset_graph
    parents = {AssetKey(list(path)) for paths in assets.values() for path in paths}
    return any(graph.has(key) and graph.get(key).partitions_def is not None for key in parents)


def _freeze_asset(
    instance: DagsterInstance,
    run: DagsterRun,
    name: str,
    parents: Sequence[Sequence[str]],
    workspace: BaseWorkspaceRequestContext,
) -> AssetHandOver:
    graph = workspace.asset_graph
    key = AssetKey.from_user_string(name)
    keys = asset_partitions(instance, run, graph, key)
    upstream: dict[str, list[str]] = {}
    for path in parents:
        parent = AssetKey(list(path))
        found = parent_partitions(instance, graph, key, parent, keys)
        if found is not None:
            upstream[parent.to_user_string()] = list(found)
    return AssetHandOver(keys=[_partition_key(one) for one in keys], parents=upstream)


def _partition_key(key: str) -> PartitionKey:
    dimensions = dict(key.keys_by_dimension) if isinstance(key, MultiPartitionKey) else {}
    return PartitionKey(key=str(key), dimensions=dimensions)
