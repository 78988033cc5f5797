"""Which commit of each project this code location was loaded at.

A run's process is told by the code server, so that it runs the code that the UI shows; a sensor asks, so that it knows
whether a newer commit is there.
"""

from __future__ import annotations

from pathlib import Path

from valohai_dagster.plugin.compat import code_location_pin, pin_code_location

BROKEN = ""  # loaded, but as the placeholder of a project that could not be read
_loaded: dict[str, str] = {}


def location_pin(source: str | Path, yaml_path: str, revision: str | None) -> str:
    """The name under which a project's commit is remembered."""
    return f"valohai/commit/{source}/{yaml_path}/{revision or ''}"


def pinned_commit(pin: str) -> str | None:
    """The commit that the code server loaded; None in the code server itself and outside code locations."""
    return code_location_pin(pin)


def remember_loaded(pin: str, commit: str, *, for_runs: bool = False) -> None:
    """`for_runs` also hands it to the processes that load the code location again."""
    _loaded[pin] = commit
    if for_runs:
        pin_code_location(pin, commit)


def loaded_commit(pin: str) -> str | None:
    """What this process serves, `BROKEN` for a placeholder; None when the project was not loaded here."""
    return _loaded.get(pin, code_location_pin(pin))
