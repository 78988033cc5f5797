"""Run-status, failure and asset sensors, automation conditions and freshness policies, through Dagster's own daemons.

The same scenario runs on Dagster's engine and through the conductor: what the daemons then do, and the runs that they
request, are the same.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from dagster import DagsterInstance
from dagster._daemon.asset_daemon import AssetDaemon
from dagster._daemon.freshness import FreshnessDaemon
from dagster._daemon.sensor import execute_sensor_iteration

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.exclusions import IN_PROCESS
from tests.integration.plugin.driver.seen import stale, status
from tests.integration.plugin.driver.yamls import CHAIN
from tests.support.dagster_side import QUEUED, Ask, Side, key_of, log
from tests.support.sim_worker import Play

WATCHED = """
import os
from datetime import timedelta
from pathlib import Path

import dagster as dg

from valohai_dagster import load_valohai_project

loaded = load_valohai_project(Path(__file__).parent / "digits")
POLICIES = {
    "prep": {"freshness_policy": dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=1))},
    "report": {"automation_condition": dg.AutomationCondition.eager()},
}
assets = dg.map_asset_specs(
    lambda spec: spec.replace_attributes(**POLICIES.get(spec.key.path[-1], {})), loaded.assets
)


def tell(text):
    with open(os.environ["TOLD"], "a") as file:
        file.write(text + "\\n")


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS, default_status=dg.DefaultSensorStatus.RUNNING
)
def on_success(context):
    run = context.dagster_run
    asked = sorted(key.path[-1] for key in run.asset_selection or ())
    tell(f"success of {asked or run.job_name}: {context.dagster_event.message}")


@dg.run_failure_sensor(default_status=dg.DefaultSensorStatus.RUNNING)
def on_failure(context):
    steps = [
        (event.step_key, event.step_failure_data.user_failure_data.description)
        for event in context.get_step_failure_events()
    ]
    tell(f"failure: {context.failure_event.message} {steps}")


training = dg.define_asset_job("training", selection=[dg.AssetKey(["digits", "train"])])


@dg.asset_sensor(
    asset_key=dg.AssetKey(["digits", "prep"]),
    job=training,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def on_prep(context, event):
    return dg.RunRequest(run_key=context.cursor)


automation = dg.AutomationConditionSensorDefinition(
    "automation",
    target=dg.AssetSelection.all(),
    default_status=dg.DefaultSensorStatus.RUNNING,
)
defs = dg.Definitions(
    assets, jobs=[training], sensors=[on_success, on_failure, on_prep, automation]
)
"""


class Watched:
    """The scenario; `told` has what the sensors' functions wrote, by side."""

    def __init__(self) -> None:
        self.told: dict[str, list[str]] = {}
        self.freshness: dict[str, dict[str, str]] = {}

    def __call__(self, side: Side) -> None:
        told = side.root / "told.txt"
        told.touch()
        os.environ["TOLD"] = str(told)
        with contextlib.closing(_Daemons(side)) as daemons:
            daemons.look()  # from now on they know what is new
            side.run(Ask(assets=["prep", "train", "report"]))
            daemons.look()
            side.worker.plays["prep"] = Play(outputs={"part.csv": b"other\n"})
            side.run(Ask(assets=["prep"]))
            daemons.look()  # asks for train
            daemons.look()  # asks for report
            side.worker.plays["prep"] = Play.failing()
            side.run(Ask(assets=["prep"]))
            daemons.look()
        self.told[side.name] = sorted(told.read_text().splitlines())  # sensors come in any order
        self.freshness[side.name] = _freshness(side.instance)


class _Daemons:
    def __init__(self, side: Side) -> None:
        self._side = side
        settings = side.instance.get_auto_materialize_settings()
        self._assets = AssetDaemon(settings, pre_sensor_interval_seconds=0)

    def look(self) -> None:
        """One look of each daemon; the runs that they ask for run to their end."""
        context = self._side.context
        for look in (
            execute_sensor_iteration(context, log, None, None),
            FreshnessDaemon().run_iteration(context),
        ):
            errors = [error for error in look or () if error]
            assert not errors, errors
        self._assets._run_iteration_impl(context, None, {}, {})
        self._side.dequeue()
        for run in self._side.instance.get_runs():
            self._side.ended(run.run_id)

    def close(self) -> None:
        self._assets.__exit__(None, None, None)


def _freshness(instance: DagsterInstance) -> dict[str, str]:
    records = instance.get_freshness_state_records([key_of("prep")])
    return {key.path[-1]: record.freshness_state.value for key, record in records.items()}


def test_what_daemons_do_after_a_run_is_the_same(
    same: Comparison, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOLD", str(tmp_path))
    for module in ("sensor", "asset_daemon"):  # each look evaluates all
        monkeypatch.setattr(
            f"dagster._daemon.{module}.is_under_min_interval", lambda *_, **__: False
        )
    scenario = Watched()
    options = {**QUEUED, "freshness": {"enabled": True}}
    fields = {**IN_PROCESS.fields, "dagster/tick": "the daemon shuffles the sensors"}
    case = Case(
        yaml=CHAIN,
        defs=WATCHED,
        scenario=scenario,
        options=options,
        exclusions=replace(IN_PROCESS, fields=fields),
    )
    seen = same(case)
    assert [status(seen, run) for run in range(len(seen.runs))] == ["SUCCESS"] * 5 + ["FAILURE"]
    assert stale(seen) == {"prep": "FRESH", "train": "FRESH", "report": "FRESH"}
    engine, conductor = scenario.told["engine"], scenario.told["conductor"]
    assert engine == conductor
    assert [line.partition(":")[0] for line in engine] == [
        "failure",
        "success of ['prep', 'report', 'train']",
        "success of ['prep']",
        "success of ['report']",  # asked for by the automation condition
        "success of training",  # asked for by the asset sensor, twice
        "success of training",
    ]
    assert scenario.freshness == {"engine": {"prep": "PASS"}, "conductor": {"prep": "PASS"}}
