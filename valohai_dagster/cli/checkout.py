"""Where a deployment's own code and its DAGSTER_HOME are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from valohai_dagster.errors import ConfigurationError
from valohai_dagster.settings import Settings


def checkout_root(settings: Settings) -> Path:
    """The directory that holds `definitions`: beside valohai.toml, else the current one."""
    root = settings.config_file.parent if settings.config_file else Path.cwd()
    if not (root / "definitions").is_dir():
        raise ConfigurationError(
            f"this command runs the package `definitions` of a checkout, and {root} has none; "
            "clone the repository and run it there"
        )
    return root


def dagster_home(root: Path, settings: Settings) -> Path:
    """$DAGSTER_HOME, or one in the state directory with the checkout's dagster.yaml."""
    if chosen := os.environ.get("DAGSTER_HOME"):
        return Path(chosen)
    home = settings.state_dir / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    template = root / "dagster.yaml"
    if template.is_file():
        shutil.copyfile(template, home / "dagster.yaml")
    return home
