"""Which versions of its upstream assets a step uses: read when it starts, and kept with its execution."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import dagster as dg
from dagster import AssetKey, DagsterInstance, DagsterRun, EventLogRecord

from valohai_dagster.plugin.compat import version_of_records
from valohai_dagster.plugin.compat.engine import (
    DEFAULT_DATA_VERSION,
    DataVersionCache,
    data_version_tags,
)
from valohai_dagster.plugin.launching import used_record, used_records
from valohai_dagster.plugin.upstream_results import latest_ids
from valohai_dagster.plugin.used_inputs import Used

log = logging.getLogger(__name__)

Frozen = Mapping[str, Sequence[str]]  # parent asset key (user string) -> partitions it depends on


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Per parent (user string of its key): the data version, and the storage id of the event it came with."""

    versions: Mapping[str, str] = field(default_factory=dict)
    pointers: Mapping[str, int | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"versions": dict(self.versions), "pointers": dict(self.pointers)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        return cls(versions=data.get("versions") or {}, pointers=data.get("pointers") or {})

    def with_used(self, used: Sequence[Used]) -> Provenance:
        """The same, but of these assets what was really used."""
        names = {one.key.to_user_string(): one for one in used}
        versions = {**self.versions, **{name: one.version for name, one in names.items()}}
        pointers = {**self.pointers, **{name: one.storage_id for name, one in names.items()}}
        return Provenance(versions=versions, pointers=pointers)

    def tags(self, data_version: str, code_version: str) -> dict[str, str]:
        """As the engine writes them (DAGSTER_NOTES 5)."""
        inputs = {
            AssetKey.from_user_string(key): {
                "data_version": dg.DataVersion(version),
                "storage_id": self.pointers.get(key),
            }
            for key, version in self.versions.items()
        }
        return data_version_tags(dg.DataVersion(data_version), code_version, inputs)


class Parents:
    """The upstream assets of one step of a run, as they are now."""

    def __init__(
        self,
        instance: DagsterInstance,
        run: DagsterRun,
        parents: Sequence[Sequence[str]],
        partitions: Frozen,
    ) -> None:
        self._instance, self._run, self._partitions = instance, run, partitions
        self._keys = [AssetKey(list(path)) for path in parents]
        self._used: dict[AssetKey, Sequence[EventLogRecord]] = {}
        self._infos = self._read() if self._keys else {}

    def _read(self) -> Mapping[AssetKey, Any]:
        context: Any = _StepContext(self._instance, self._partitions)
        cache = DataVersionCache(context)
        cache._fetch_input_asset_version_info(self._keys)
        return cache.input_asset_version_info

    def records(self, key: AssetKey, warn: Callable[[str], None]) -> Sequence[EventLogRecord]:
        """The materializations of an upstream asset that the step takes its inputs from."""
        partitions = self._partitions.get(key.to_user_string())
        if partitions is not None:
            found = used_records(self._instance, self._run, key, list(partitions), warn)
        else:
            info = self._infos.get(key)
            latest = info.storage_id if info else None
            record = used_record(self._instance, self._run, key, latest)
            found = [record] if record is not None else []
        self._used[key] = found
        return found

    def provenance(self) -> Provenance:
        """The newest versions, but of what the step took although newer ones are there: those."""
        versions: dict[str, str] = {}
        pointers: dict[str, int | None] = {}
        for key in self._keys:
            info = self._infos.get(key)
            version = info.data_version if info else None
            storage_id = info.storage_id if info else None
            if records := self._older(key, storage_id):
                partitioned = key.to_user_string() in self._partitions
                version = version_of_records(records, partitioned=partitioned)
                storage_id = max(record.storage_id for record in records)
            name = key.to_user_string()
            versions[name] = (version or DEFAULT_DATA_VERSION).value
            pointers[name] = storage_id
        return Provenance(versions=versions, pointers=pointers)

    def _older(self, key: AssetKey, latest_id: int | None) -> Sequence[EventLogRecord]:
        """What was used of the asset when there is something newer; else nothing."""
        records = self._used.get(key, ())
        partitions = self._partitions.get(key.to_user_string())
        newest = {latest_id}
        if partitions is not None:
            newest = set(latest_ids(self._instance, key, partitions).values())
        return records if any(record.storage_id not in newest for record in records) else ()


class _StepContext:
    """Stands where the engine's step context stands for the reading of input versions."""

    def __init__(self, instance: DagsterInstance, partitions: Frozen) -> None:
        self.instance = instance
        self.node_handle = None
        self.log = log
        self._partitions = partitions
        self.job_def = SimpleNamespace(asset_layer=self)

    def get_node_input_name(self, node_handle: object, key: AssetKey) -> str:
        return key.to_user_string()

    def has_asset_partitions_for_input(self, name: str) -> bool:
        return name in self._partitions

    def asset_partitions_subset_for_input(
        self, name: str, *, require_valid_partitions: bool = True
    ) -> Any:
        keys = list(self._partitions[name])
        return SimpleNamespace(get_partition_keys=lambda: keys)
