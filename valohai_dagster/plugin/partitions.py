"""The partitions that one execution makes, and how they reach the user's command."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PARTITION_TAG = "dagster/partition"  # of runs; with /<dimension> appended for each dimension
KEY_VARIABLE = "VH_PARTITION_KEY"
KEYS_VARIABLE = "VH_PARTITION_KEYS"
MAX_KEYS_BYTES = 64 * 1024  # of the JSON list; Linux takes no variable above 128 KiB


@dataclass(frozen=True, kw_only=True)
class RunPartitions:
    """Partition keys in the order of the definition; empty for an asset without partitions.

    `dimensions` is the one key's value per dimension where partitions have several dimensions.
    """

    keys: tuple[str, ...] = ()
    dimensions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> RunPartitions:
        """Of a run for one partition. A range needs the definition, which tags do not hold."""
        key = tags.get(PARTITION_TAG)
        prefix = f"{PARTITION_TAG}/"
        dimensions = {
            name.removeprefix(prefix): value
            for name, value in tags.items()
            if name.startswith(prefix)
        }
        return cls(keys=(key,), dimensions=dimensions) if key is not None else NO_PARTITIONS

    @classmethod
    def of_keys(cls, keys: Sequence[str]) -> RunPartitions:
        """Keys as Dagster gives them: those of several dimensions know their parts."""
        known: Any = getattr(keys[0], "keys_by_dimension", {}) if len(keys) == 1 else {}
        return cls(keys=tuple(str(key) for key in keys), dimensions=dict(known))

    @property
    def label(self) -> str | None:
        """The only key, or `first...last`."""
        if not self.keys:
            return None
        return self.keys[0] if len(self.keys) == 1 else f"{self.keys[0]}...{self.keys[-1]}"

    def variables(self) -> dict[str, str]:
        """Environment variables of the command."""
        if self.label is None:
            return {}
        out = {KEY_VARIABLE: self.label}
        out |= {
            f"{KEY_VARIABLE}_{re.sub(r'[^A-Z0-9_]', '_', name.upper())}": value
            for name, value in self.dimensions.items()
        }
        listed = json.dumps(self.keys, ensure_ascii=False)
        return {**out, KEYS_VARIABLE: listed} if len(listed.encode()) <= MAX_KEYS_BYTES else out

    def parameter(self, *, multiple: bool) -> str | list[str] | None:
        """The value of the step's partition parameter: all keys where it takes several values, else the label."""
        return list(self.keys) if multiple and self.keys else self.label


NO_PARTITIONS = RunPartitions()
