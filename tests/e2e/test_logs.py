"""Logs through the webserver: a flood of lines, and an agent that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Deployment, Probe
from tests.support.dagster_app import DagsterApp
from tests.support.ports import wait_for

pytestmark = pytest.mark.slow

LINES = 100_000
ANSWER_SECONDS = 5.0
_GAP = re.compile(r"\.\.\. (\d+) lines are only in the stored log")


def test_m02_a_flood_of_lines_is_thinned_while_it_runs_and_complete_afterwards(
    app: DagsterApp, probe: Probe, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    run_id = probe.launch("flood", parameters={"lines": LINES, "until": str(done)})
    slowest = 0.0

    def flooded() -> bool:
        nonlocal slowest
        began = time.monotonic()
        log = app.log(run_id)
        slowest = max(slowest, time.monotonic() - began)
        return "only in the stored log" in log.stdout

    wait_for(flooded, seconds=90, every=0.1, what="the gap marker")
    live = app.log(run_id)
    shown = [line for line in live.stdout.splitlines() if line.startswith("line ")]
    left_out = [int(number) for number in _GAP.findall(live.stdout)]
    assert 0 < len(shown) <= 1000
    assert len(shown) + sum(left_out) == LINES
    assert "More than 50.0 events per second are being written to stdout" in live.stderr
    done.touch()
    assert app.finished(run_id).status == "SUCCESS"
    expected = "".join(f"line {n}\n" for n in range(LINES)) + "the last line, without an end"
    assert app.log(run_id).stdout == expected
    assert slowest < ANSWER_SECONDS


def test_an_agent_that_is_killed_costs_an_attempt_and_no_line(
    app: DagsterApp, probe: Probe, deployment: Deployment, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    run_id = probe.launch("twice", parameters={"marker": str(marker)})
    wait_for(lambda: "first try" in app.log(run_id).stdout, seconds=60, every=0.3, what="its line")
    (leased,) = [m for m in app.messages(run_id) if "leased by worker" in m]
    name = leased.split("leased by worker ")[1].split()[0]
    agent = json.loads((deployment.state / "agents" / f"{name}.json").read_text())
    os.kill(agent["pid"], signal.SIGKILL)
    assert app.finished(run_id).status == "SUCCESS", app.messages(run_id)[-10:]
    assert app.metadata(run_id, "twice")["attempt"] == "2"
    stdout = app.log(run_id).stdout
    assert stdout.index("first try") < stdout.index("attempt 2 ----") < stdout.index("second try")
    assert any(f"{name} was lost" in message for message in app.messages(run_id))
