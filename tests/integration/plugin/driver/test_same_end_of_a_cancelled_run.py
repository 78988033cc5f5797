"""Terminating a run: what the conductor leaves is what Dagster's engine leaves."""

from __future__ import annotations

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.exclusions import MULTIPROCESS
from tests.integration.plugin.driver.seen import kinds, status
from tests.integration.plugin.driver.yamls import CHAIN, DIAMOND, RETRYING
from tests.support.dagster_side import Ask, MultiprocessSide, Side
from tests.support.sim_worker import Play
from valohai_agent import protocol as p


class Terminated:
    """A scenario whose run is terminated as soon as the command of one step runs."""

    def __init__(self, *assets: str, at: str, **others: Play) -> None:
        self._assets = assets
        self._side: Side
        self.plays = {at: Play.endless(self._terminate), **others}

    def __call__(self, side: Side) -> None:
        self._side = side
        side.run(Ask(assets=self._assets))

    def _terminate(self, job: p.Job) -> None:
        assert job.run_id
        assert job.step_key
        self._side.wait_for_event(job.run_id, "STEP_START", job.step_key)
        self._side.terminate(job.run_id)


def test_a_running_step_is_stopped_and_the_rest_is_not_begun(same: Comparison) -> None:
    """K-54: the worker is told to stop, and the run ends once it has."""
    scenario = Terminated("prep", "train", "report", at="train")
    seen = same(Case(yaml=CHAIN, scenario=scenario, plays=scenario.plays))
    assert status(seen) == "CANCELED"
    assert kinds(seen, "train")[-1] == "STEP_FAILURE"
    assert "STEP_START" not in kinds(seen, "report")


def test_a_stopped_step_with_a_retry_policy_ends_as_with_dagsters_default_executor(
    same: Comparison,
) -> None:
    """The in-process executor would begin the step again; the default one does not."""
    scenario = Terminated("prep", "train", at="prep")
    case = Case(
        yaml=CHAIN,
        scenario=scenario,
        plays=scenario.plays,
        defs=RETRYING,
        engine=MultiprocessSide,
        exclusions=MULTIPROCESS,
        at_once="steps",  # see test_same_logs_and_workers_as_the_engine.py
    )
    seen = same(case)
    assert status(seen) == "CANCELED"
    assert "STEP_RESTARTED" not in kinds(seen, "prep")


def test_a_run_that_is_cancelled_before_its_launch_never_starts(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        run = side.create(Ask(assets=["prep"]))
        side.instance.report_run_canceled(run)

    seen = same(Case(yaml=DIAMOND, scenario=scenario))
    assert status(seen) == "CANCELED"
