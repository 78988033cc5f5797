"""The code location that `workspace.yaml` loads: this deployment's projects, schedules and sensors.

Add a project by a line in `PROJECTS`: a directory, or a Git URL with `revision=` and `auth=`. A project that cannot
be read shows up as one asset that says why; the others load.
"""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from resources import RESOURCES
from sensors import JOBS, SCHEDULES, SENSORS
from valohai_dagster import load_valohai_project

ROOT = Path(__file__).resolve().parent.parent

PROJECTS = [
    load_valohai_project(ROOT / "examples" / "digits", name="digits"),
]

defs = dg.Definitions.merge(
    *PROJECTS,
    dg.Definitions(jobs=JOBS, schedules=SCHEDULES, sensors=SENSORS, resources=RESOURCES),
)
