"""What a checkout promises: every target of `make help` does something, and both packages are one release."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from valohai_agent.version import __version__ as agent_version
from valohai_dagster.version import __version__

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
DOCUMENTED = re.findall(r"^([a-z-]+):.*  ## \S", MAKEFILE, re.MULTILINE)


def make(*args: str) -> subprocess.CompletedProcess[str]:
    """Prints what make would do, as if nothing had been made yet."""
    found = shutil.which("make")
    assert found, "make is not installed; it is what the checkout is driven with"
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        [found, "--dry-run", "--always-make", *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def pyproject(path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads((ROOT / path).read_text("utf-8"))


def test_the_targets_that_the_readme_and_ci_name_are_documented() -> None:
    assert {"demo", "test", "up", "down", "clean", "lint", "bench-dispatch"} <= set(DOCUMENTED)


@pytest.mark.parametrize("target", DOCUMENTED)
def test_every_documented_target_has_a_recipe(target: str) -> None:
    done = make(target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Nothing to be done" not in done.stdout


def test_help_lists_every_phony_target() -> None:
    phony = re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert sorted(phony[1].split()) == sorted(DOCUMENTED)


def test_both_packages_are_one_release() -> None:
    """The protocol between them has its own version; the packages are still released and installed together."""
    pins = [d for d in pyproject("pyproject.toml")["project"]["dependencies"] if "agent" in d]
    assert pins == [f"valohai-agent=={__version__}"]
    assert agent_version == __version__


def test_the_versions_of_the_distributions_come_from_the_version_files() -> None:
    for path, file in (
        ("pyproject.toml", "valohai_dagster/version.py"),
        ("agent/pyproject.toml", "valohai_agent/version.py"),
    ):
        data = pyproject(path)
        assert "version" in data["project"]["dynamic"]
        assert data["tool"]["hatch"]["version"]["path"] == file
