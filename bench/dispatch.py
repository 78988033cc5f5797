"""Time from a launch to the first output line of the user's command: ours, Dagster's default launcher, and nothing.

Every row runs the same command, in turn, in an order that changes from round to round:

- a step of a valohai.yaml on the embedded default, process runtime and Docker runtime, with this repository's
  dagster.yaml (our launcher, coordinator and compute logs; the conductor drives the run);
- an asset that starts the command as a subprocess, with Dagster's default launcher;
- `docker run` of the same image, and `sh -c`, both without Dagster: what nobody can be faster than.

Our side and the default launcher have a webserver each, with a DAGSTER_HOME of its own. One could serve both, since
our launcher hands runs without steps of ours to the default one; but then every figure of the other side would have
our code in its way. Nothing but the measured side has work to do. Neither waits for a daemon's tick: ours starts its
runs at once, the other has Dagster's `DefaultRunCoordinator`, which does so too.

Launches go through GraphQL as from the UI and are timed from just before the request is sent; the time since its
answer came is told as well. The command prints the moment at which it speaks, so nobody's log delivery is measured.
The first launch of each row is cold (ours then also starts Redis, the service and an agent) and reported apart.

    python -m bench.dispatch [--rounds N] [--image IMAGE]

The image needs python3 and sh; without one the tests' own is taken, or built. Without Docker its rows are left out.
The last line is JSON: ratio_default_over_ours, ratio_default_over_ours_docker, seconds_over_bare_docker,
seconds_over_bare_process and the medians behind them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from tests.images import build
from tests.support.dagster_app import FINAL, DagsterApp, GraphQLError

COMMAND = (
    """python3 -c 'import json, time; print(json.dumps({"spoke_at": time.time()}), flush=True)'"""
)
SETTLE_SECONDS = 1.0  # what a launch leaves behind is tidied up before the next one is timed
POLL_SECONDS = 0.5  # each look costs the webserver time that the measured side would miss

VALOHAI_YAML = """\
- step:
    name: hello
    image: {image}
    command: |
      {command}
- step:
    name: contained
    image: {image}
    environment: containers
    command: |
      {command}
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
  - python_file: {{relative_path: {name}.py, location_name: {name}}}
"""
OUR_DAGSTER_YAML = Path(__file__).parents[1] / "dagster.yaml"
PLAIN_DAGSTER_YAML = """\
run_coordinator:
  module: dagster.core.run_coordinator
  class: DefaultRunCoordinator
telemetry: {enabled: false}
"""
VALOHAI_TOML = """\
[groups.local]
runtime = "process"
scale_down_grace_seconds = 900
[groups.containers]
runtime = "docker"
scale_down_grace_seconds = 900
[environments]
containers = "containers"
"""

PROCESS, DOCKER, PLAIN_ROW = "ours, process runtime", "ours, Docker runtime", "default launcher"
BARE_DOCKER, BARE_PROCESS = "bare docker run", "bare sh -c"


class NoDocker(Exception):
    """Why the rows with containers are left out."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds from just before the request; `accepted` are those from its answer to the first output."""

    first_output: float
    total: float
    accepted: float | None = None


Row = Callable[[], Timing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="launches per row after the cold one")
    parser.add_argument("--image", default="", help="for the Docker rows; needs python3 and sh")
    options = parser.parse_args()
    rounds = max(1, options.rounds)
    try:
        image, missing = docker_image(options.image), ""
    except NoDocker as error:
        image, missing = "", str(error)
    with tempfile.TemporaryDirectory(prefix="vhb-", dir="/tmp") as work:
        timings = measure(Path(work), rounds, image)
    report(timings, missing)


def docker_image(wanted: str) -> str:
    """An image that the daemon has. Raises NoDocker."""
    import docker
    import docker.errors

    if shutil.which("docker") is None:
        raise NoDocker("the command `docker` is not installed")
    try:
        client = docker.from_env(timeout=60)
        with contextlib.closing(client):
            if not wanted:
                return build.ensure(client)
            client.images.get(wanted)
    except docker.errors.ImageNotFound as error:
        raise NoDocker(f"the daemon has no image {wanted!r}; pull it first") from error
    except docker.errors.DockerException as error:
        raise NoDocker(f"no Docker daemon answers: {error}") from error
    except build.ImageBuildError as error:
        raise NoDocker(f"{error}; or name an image that has python3 with --image") from error
    return wanted


# -- measuring --------------------------------------------------------------------------------------------------


def measure(work: Path, rounds: int, image: str) -> dict[str, list[Timing]]:
    """Timings by row in launch order, the cold one first."""
    with open_rows(work, image) as rows:
        names = list(rows)
        timings: dict[str, list[Timing]] = {name: [] for name in names}
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                timings[name].append(rows[name]())
                time.sleep(SETTLE_SECONDS)
    return timings


@contextlib.contextmanager
def open_rows(work: Path, image: str) -> Iterator[dict[str, Row]]:
    """What can be measured here, ready to be launched."""
    environment = lay_out(work, image)
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment["PATH"] = search  # one python3 for all rows but the container's
    plain, ours = Webserver(work / "plain", environment), Webserver(work / "ours", environment)
    try:
        with plain, ours:
            rows: dict[str, Row] = {
                PLAIN_ROW: lambda: launched(plain, "plain", "hello"),
                PROCESS: lambda: launched(ours, "ours", "hello"),
                BARE_PROCESS: lambda: bare(["/bin/sh", "-c", COMMAND], environment),
            }
            if image:
                run = ["docker", "run", "--rm", image, "/bin/sh", "-c", COMMAND]
                rows[DOCKER] = lambda: launched(ours, "ours", "contained")
                rows[BARE_DOCKER] = lambda: bare(run, environment)
            yield rows
    finally:
        command = [sys.executable, "-m", "valohai_dagster", "down"]
        values = {**os.environ, **environment}
        subprocess.run(command, cwd=work, env=values, check=False, stdout=2)


def lay_out(work: Path, image: str) -> dict[str, str]:
    """Two DAGSTER_HOMEs with a code location each, and a fresh state directory; gives the environment of both."""
    step = VALOHAI_YAML.format(image=image or "python:3.11-slim", command=COMMAND)
    for name, text in {
        "ours/project/valohai.yaml": step,
        "ours/ours.py": OURS,
        "ours/workspace.yaml": WORKSPACE.format(name="ours"),
        "ours/home/dagster.yaml": OUR_DAGSTER_YAML.read_text(),
        "plain/plain.py": PLAIN,
        "plain/workspace.yaml": WORKSPACE.format(name="plain"),
        "plain/home/dagster.yaml": PLAIN_DAGSTER_YAML,
        "valohai.toml": VALOHAI_TOML,
    }.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    return {
        "VALOHAI_CONFIG": str(work / "valohai.toml"),
        "VALOHAI_STATE": str(work / "state"),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
    }


class Webserver(DagsterApp):
    """Without a daemon, and with one client for all requests, as a browser has: making one takes 20 ms."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        home, workspace = root / "home", root / "workspace.yaml"
        super().__init__(home, workspace, environment=environment, daemon=False)
        limits = httpx.Limits(keepalive_expiry=1.0)  # before the server closes the connection
        self._client = httpx.Client(timeout=60, verify=False, limits=limits)

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        body = {"query": query, "variables": variables}
        answer = self._client.post(f"{self.url}/graphql", json=body).raise_for_status().json()
        if answer.get("errors"):
            raise GraphQLError(str(answer["errors"]))
        return answer["data"]


def launched(app: Webserver, location: str, asset: str) -> Timing:
    app.graphql("{ version }")  # the connection is open, as a browser's is
    sent = time.time()
    run_id = app.launch(location, [[location, asset]])
    answered = time.time()
    while (state := app.run(run_id)).status not in FINAL:
        time.sleep(POLL_SECONDS)
    if state.status != "SUCCESS" or state.ended is None:
        messages = "\n".join(app.messages(run_id)[-15:])
        raise SystemExit(f"{location}: run {run_id} ended as {state.status}\n{messages}")
    metadata = app.metadata(run_id, asset)
    spoke = float(metadata.get("metrics/spoke_at") or metadata["spoke_at"])
    return Timing(
        first_output=spoke - sent, accepted=max(0.0, spoke - answered), total=state.ended - sent
    )


def bare(command: Sequence[str], environment: Mapping[str, str]) -> Timing:
    values = {**os.environ, **environment}
    began = time.time()
    done = subprocess.run(command, env=values, stdout=subprocess.PIPE, check=True, text=True)
    ended = time.time()
    return Timing(first_output=json.loads(done.stdout)["spoke_at"] - began, total=ended - began)


# -- reporting --------------------------------------------------------------------------------------------------


def report(timings: Mapping[str, Sequence[Timing]], missing: str) -> None:
    rounds = len(timings[PROCESS]) - 1
    console = Console(width=max(100, Console().width))
    table = Table(title=f"Seconds from launch, median of {rounds} (cold: the first)")
    headings = ("first output", "least", "most", "after answer", "cold", "end", "cold end")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for name in (PROCESS, DOCKER, PLAIN_ROW, BARE_PROCESS, BARE_DOCKER):
        if name in timings:
            table.add_row(name, *cells(timings[name]))
    console.print(table)
    if missing:
        console.print(f"Without the Docker rows: {missing}.")
    print(json.dumps(figures(timings)))


def cells(timings: Sequence[Timing]) -> list[str]:
    warm = [timing.first_output for timing in timings[1:]]
    accepted = [timing.accepted for timing in timings[1:] if timing.accepted is not None]
    return [
        f"{statistics.median(warm):.3f}",
        f"{min(warm):.3f}",
        f"{max(warm):.3f}",
        f"{statistics.median(accepted):.3f}" if accepted else "",
        f"{timings[0].first_output:.3f}",
        f"{statistics.median(timing.total for timing in timings[1:]):.3f}",
        f"{timings[0].total:.3f}",
    ]


def figures(timings: Mapping[str, Sequence[Timing]]) -> dict[str, Any]:
    """Of the warm launches; None for what was not measured. `load` is the machine's over the last 15 minutes, for a
    machine with other work shows less than it could."""

    def median(name: str, field: str = "first_output") -> float | None:
        found = [getattr(timing, field) for timing in timings.get(name, ())[1:]]
        return statistics.median(found) if found else None

    ours, contained, default = median(PROCESS), median(DOCKER), median(PLAIN_ROW)
    bare_process, bare_docker = median(BARE_PROCESS), median(BARE_DOCKER)
    values = {
        "ratio_default_over_ours": default and ours and default / ours,
        "ratio_default_over_ours_docker": default and contained and default / contained,
        "seconds_over_bare_docker": contained and bare_docker and contained - bare_docker,
        "seconds_over_bare_process": ours and bare_process and ours - bare_process,
        "first_output_s": ours,
        "docker_first_output_s": contained,
        "default_launcher_first_output_s": default,
        "bare_process_first_output_s": bare_process,
        "bare_docker_first_output_s": bare_docker,
        "accepted_to_first_output_s": median(PROCESS, "accepted"),
        "docker_accepted_to_first_output_s": median(DOCKER, "accepted"),
        "total_s": median(PROCESS, "total"),
        "docker_total_s": median(DOCKER, "total"),
        "default_launcher_total_s": median(PLAIN_ROW, "total"),
        "cold_first_output_s": timings[PROCESS][0].first_output,
    }
    rounded = {key: None if value is None else round(value, 3) for key, value in values.items()}
    return {**rounded, "rounds": len(timings[PROCESS]) - 1, "load": round(os.getloadavg()[2], 2)}


if __name__ == "__main__":
    main()
