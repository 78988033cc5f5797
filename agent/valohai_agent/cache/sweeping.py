"""What dead machines leave on a share, and how it goes: by age, for whatever is young may still be in the making.

Times are those of the file server. Each function looks at one of the 256 directories of its kind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

FACTS = ".json"


def sweep_objects(part: Path, before: float) -> None:
    """Removes contents without facts, facts without their content, and half-written facts, all from before that time."""
    entries = {entry.name: entry for entry in os.scandir(part)}
    for name, entry in entries.items():
        other = name.removesuffix(FACTS) if name.endswith(FACTS) else f"{name}{FACTS}"
        if name.startswith(".") or other not in entries:
            _remove(Path(entry.path), before)


def sweep_names(part: Path, before: float, *, is_kept: Callable[[str], bool]) -> None:
    """Removes names of contents that are gone, and half-written ones, all from before that time."""
    for entry in os.scandir(part):
        path = Path(entry.path)
        with contextlib.suppress(FileNotFoundError):
            if _changed(path) < before and (
                entry.name.startswith(".") or not is_kept(path.read_text(errors="replace").strip())
            ):
                path.unlink()


def _remove(path: Path, before: float) -> None:
    with contextlib.suppress(FileNotFoundError):
        if _changed(path) < before:
            path.unlink()


def _changed(path: Path) -> float:
    """When its content, or what else is known about it, was last changed: a content keeps its time when it is moved."""
    return path.stat().st_ctime
