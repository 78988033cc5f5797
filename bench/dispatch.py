"""Time from a launch to the first output line of the user's command: ours against Dagster's default launcher.

Both sides run the same command in the same webserver, launched through GraphQL as the UI does: ours as a step of a
valohai.yaml on the embedded default (process runtime), the other as an asset that starts it as a subprocess. The
command prints the moment at which it speaks, so that nobody's log delivery is measured. Launches alternate; the first
of each side is cold (ours then also starts Redis, the service and an agent) and reported apart.

    python -m bench.dispatch [--rounds N]

The last line is JSON: first_output_s, default_launcher_first_output_s, ratio_default_over_ours and more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.dagster_app import DagsterApp

COMMAND = (
    """python3 -c 'import json, time; print(json.dumps({"spoke_at": time.time()}), flush=True)'"""
)

VALOHAI_YAML = f"""\
- step:
    name: hello
    image: python:3.11-slim
    command: |
      {COMMAND}
"""
OURS = """\
from pathlib import Path
from valohai_dagster import load_valohai_project
defs = load_valohai_project(Path(__file__).parent / "project", name="ours")
"""
PLAIN = f"""\
import json, subprocess
import dagster as dg

@dg.asset(key=["plain", "hello"])
def hello():
    done = subprocess.run({COMMAND!r}, shell=True, check=True, capture_output=True, text=True)
    return dg.MaterializeResult(metadata=json.loads(done.stdout))

defs = dg.Definitions(assets=[hello])
"""
WORKSPACE = """\
load_from:
  - python_file: {relative_path: ours.py, location_name: ours}
  - python_file: {relative_path: plain.py, location_name: plain}
"""
# Launch at once: the queue's polling interval would hide what is measured.
DAGSTER_YAML = """\
run_coordinator:
  module: dagster.core.run_coordinator
  class: DefaultRunCoordinator
telemetry: {enabled: false}
"""
VALOHAI_TOML = """\
[groups.local]
runtime = "process"
"""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds from just before the launch request."""

    first_output: float
    total: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rounds", type=int, default=5, help="launches per side after the cold one"
    )
    rounds = max(1, parser.parse_args().rounds)
    with tempfile.TemporaryDirectory(prefix="vhb-", dir="/tmp") as work:
        timings = measure(Path(work), rounds)
    report(timings, rounds)


def measure(work: Path, rounds: int) -> dict[str, list[Timing]]:
    """Timings by side in launch order, the cold one first."""
    environment = lay_out(work)
    sides = ("plain", "ours")
    timings: dict[str, list[Timing]] = {side: [] for side in sides}
    try:
        with DagsterApp(
            work / "home", work / "workspace.yaml", environment=environment, daemon=False
        ) as app:
            for number in range(rounds + 1):
                for side in sides if number % 2 else reversed(sides):
                    timings[side].append(time_one(app, side))
    finally:
        command = [sys.executable, "-m", "valohai_dagster", "down"]
        subprocess.run(command, cwd=work, env=app_environment(environment), check=False, stdout=2)
    return timings


def app_environment(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **environment}


def lay_out(work: Path) -> dict[str, str]:
    """Two code locations, a fresh DAGSTER_HOME and a fresh state directory."""
    (work / "home").mkdir()
    (work / "project").mkdir()
    for name, text in {
        "project/valohai.yaml": VALOHAI_YAML,
        "ours.py": OURS,
        "plain.py": PLAIN,
        "workspace.yaml": WORKSPACE,
        "home/dagster.yaml": DAGSTER_YAML,
        "valohai.toml": VALOHAI_TOML,
    }.items():
        (work / name).write_text(text)
    return {
        "VALOHAI_CONFIG": str(work / "valohai.toml"),
        "VALOHAI_STATE": str(work / "state"),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
    }


def time_one(app: DagsterApp, side: str) -> Timing:
    launched = time.time()
    run_id = app.launch(side, [[side, "hello"]])
    state = app.finished(run_id)
    if state.status != "SUCCESS" or state.ended is None:
        raise SystemExit(f"{side}: run {run_id} ended as {state.status}\n{app.logs()[-3000:]}")
    metadata = app.metadata(run_id, "hello")
    spoke_at = float(metadata.get("metrics/spoke_at") or metadata["spoke_at"])
    return Timing(first_output=spoke_at - launched, total=state.ended - launched)


def report(timings: dict[str, list[Timing]], rounds: int) -> None:
    ours, plain = timings["ours"], timings["plain"]
    table = Table(title=f"Seconds from launch, median of {rounds} (cold: the first)")
    for heading in ("", "first output", "cold", "total", "cold "):
        table.add_column(heading, justify="right" if heading else "left")
    for label, side in (("valohai-dagster", ours), ("default launcher, subprocess", plain)):
        table.add_row(
            label,
            f"{median(side, 'first_output'):.2f}",
            f"{side[0].first_output:.2f}",
            f"{median(side, 'total'):.2f}",
            f"{side[0].total:.2f}",
        )
    Console().print(table)
    print(json.dumps(figures(ours, plain)))


def figures(ours: Sequence[Timing], plain: Sequence[Timing]) -> dict[str, Any]:
    first, default = median(ours, "first_output"), median(plain, "first_output")
    return {
        "first_output_s": round(first, 3),
        "default_launcher_first_output_s": round(default, 3),
        "ratio_default_over_ours": round(default / first, 3),
        "total_s": round(median(ours, "total"), 3),
        "default_launcher_total_s": round(median(plain, "total"), 3),
        "cold_first_output_s": round(ours[0].first_output, 3),
        "rounds": len(ours) - 1,
    }


def median(timings: Sequence[Timing], field: str) -> float:
    """Of the warm launches."""
    return statistics.median(getattr(timing, field) for timing in timings[1:])


if __name__ == "__main__":
    main()
