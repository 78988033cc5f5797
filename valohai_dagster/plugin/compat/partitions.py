"""Which partitions a run makes and depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dagster import (
    AssetKey,
    MultiPartitionKey,
    MultiPartitionsDefinition,
    PartitionKeyRange,
    PartitionsDefinition,
)
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.definitions.partitions.utils import (
    get_multipartition_key_from_tags,
    get_tags_from_multi_partition_key,
)
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    MULTIDIMENSIONAL_PARTITION_PREFIX,
    PARTITION_NAME_TAG,
)

if TYPE_CHECKING:
    from dagster import DagsterInstance, DagsterRun


def multi_partition_tags(partition: str | None) -> dict[str, str]:
    """Tags that name the dimensions of a key of several dimensions; none for other keys."""
    if isinstance(partition, MultiPartitionKey):
        return dict(get_tags_from_multi_partition_key(partition))
    return {}


def asset_partitions(
    instance: DagsterInstance, run: DagsterRun, graph: Any, key: AssetKey
) -> Sequence[str]:
    """Partition keys of an asset that the run makes, by its tags: one, a range, or none."""
    definition = graph.get(key).partitions_def if graph.has(key) else None
    if definition is None:
        return []
    tags = run.tags
    with partition_loading_context(dynamic_partitions_store=instance):
        if any(tag.startswith(MULTIDIMENSIONAL_PARTITION_PREFIX) for tag in tags):
            return [get_multipartition_key_from_tags(tags)]
        if PARTITION_NAME_TAG in tags:
            return [_typed_key(definition, tags[PARTITION_NAME_TAG])]
        if ASSET_PARTITION_RANGE_START_TAG in tags:
            start, end = tags[ASSET_PARTITION_RANGE_START_TAG], tags[ASSET_PARTITION_RANGE_END_TAG]
            keys = PartitionKeyRange(_typed_key(definition, start), _typed_key(definition, end))
            return definition.get_partition_keys_in_range(keys)
    return []


def _typed_key(definition: PartitionsDefinition, text: str) -> str:
    if isinstance(definition, MultiPartitionsDefinition):
        return definition.get_partition_key_from_str(text)
    return text


def parent_partitions(
    instance: DagsterInstance, graph: Any, key: AssetKey, parent: AssetKey, keys: Sequence[str]
) -> Sequence[str] | None:
    """Partitions of `parent` that these partitions of `key` depend on; None when it has no partitions."""
    if not graph.has(parent) or graph.get(parent).partitions_def is None:
        return None
    upstream, own = graph.get(parent).partitions_def, graph.get(key).partitions_def
    mapping = graph.get_partition_mapping(key, parent)
    with partition_loading_context(dynamic_partitions_store=instance):
        subset = own.subset_with_partition_keys(keys) if own is not None else None
        found = mapping.get_upstream_mapped_partitions_result_for_partitions(subset, own, upstream)
        return list(found.partitions_subset.get_partition_keys())
