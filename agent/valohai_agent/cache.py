"""The worker's content-keyed cache of input files (I-33, I-35)."""

from __future__ import annotations

from pathlib import Path


class InputCache:
    """Files by content key, shared by all agents of the host that use the same directory."""

    def __init__(self, directory: Path, *, high_water: float = 0.80) -> None:
        """Evicts the least recently used files while the disk is fuller than `high_water`."""
        raise NotImplementedError

    def keys(self, limit: int = 300) -> list[str]:
        """Content keys on this machine, most recently used first: for `Worker.cached`."""
        raise NotImplementedError

    def clear(self) -> int:
        """Removes everything that no running job uses (VH_CLEAN); gives the freed bytes."""
        raise NotImplementedError
