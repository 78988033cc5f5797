"""`ValohaiRunCoordinator`: Dagster's run queue, without the wait for runs that nothing can make wait.

A run that the conductor drives costs no process, so it starts at once, in the call that submits it. Whatever a rule of
the queue concerns (a limit of runs, tags or pools) is queued, and the queue's daemon stays the only one that launches
queued runs: it reads a status and then launches, without a lock (DAGSTER_NOTES 10). Runs of Dagster's own engine are
marked, so that a limit on the mark bounds their processes while ours are unlimited.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dagster import DagsterRun, DagsterRunStatus, QueuedRunCoordinator
from typing_extensions import Self

from valohai_dagster.errors import ValohaiError
from valohai_dagster.plugin.engine_choice import why_not_driven
from valohai_dagster.plugin.launch_claims import LaunchClaims
from valohai_dagster.plugin.launcher import ValohaiRunLauncher
from valohai_dagster.plugin.queue_rules import (
    BY_CONDUCTOR,
    BY_DAGSTER,
    DRIVER_TAG,
    ENGINE_RUN_LIMIT,
    NO_LIMIT,
    rules_for,
)

if TYPE_CHECKING:
    from valohai_dagster.plugin.compat import ConfigurableClassData, SubmitRunContext

log = logging.getLogger(__name__)

CLAIM_LOOK_SECONDS = 0.05  # between two looks at a run that another process launches


class ValohaiRunCoordinator(QueuedRunCoordinator):
    """Takes the configuration of `QueuedRunCoordinator`.

    Without `max_concurrent_runs`, Dagster's default of ten applies to runs of its own engine alone.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._claims = LaunchClaims()

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> Self:
        return super().from_config_value(inst_data, with_defaults(config_value))

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        run = context.dagster_run
        if run.status is not DagsterRunStatus.NOT_STARTED:
            return super().submit_run(context)  # says so and does nothing
        ours = self._drives(run)
        marked = self._mark(run, BY_CONDUCTOR if ours else BY_DAGSTER)
        if not ours or self._must_queue(marked, context):
            return super().submit_run(context)
        try:
            return self._launch(context)
        except ValohaiError as error:
            extra = {"action": "queue-run", "run": run.run_id}
            log.warning("run %s goes through the queue: %s", run.run_id, error, extra=extra)
            return super().submit_run(context)

    def dispose(self) -> None:
        self._claims.close()
        super().dispose()

    def _drives(self, run: DagsterRun) -> bool:
        """Without our launcher the conductor drives nothing."""
        launcher = self._instance.run_launcher
        return (
            isinstance(launcher, ValohaiRunLauncher) and why_not_driven(self._instance, run) is None
        )

    def _mark(self, run: DagsterRun, driver: str) -> DagsterRun:
        """Runs of the conductor carry the mark only where it corrects one that they took over from a parent run."""
        marked = run.tags.get(DRIVER_TAG)
        if marked == driver or (driver == BY_CONDUCTOR and marked is None):
            return run
        self._instance.add_run_tags(run.run_id, {DRIVER_TAG: driver})
        return run.with_tags({**run.tags, DRIVER_TAG: driver})

    def _must_queue(self, run: DagsterRun, context: SubmitRunContext) -> bool:
        config = self._instance.get_concurrency_config()
        if rules_for(run, config):
            return True
        # The queue was told to wait for code locations that do not answer.
        queue, origin = config.run_queue_config, run.remote_job_origin
        patient = queue is not None and queue.max_user_code_failure_retries > 0
        return (
            patient
            and origin is not None
            and not context.workspace.has_code_location(origin.location_name)
        )

    def _launch(self, context: SubmitRunContext) -> DagsterRun:
        """Launches the run unless another process does, or it was cancelled or deleted meanwhile."""
        run_id = context.dagster_run.run_id
        while not self._claims.take(run_id):
            if not self._is_new(run_id):
                break
            time.sleep(CLAIM_LOOK_SECONDS)
        else:
            if self._is_new(run_id):
                self._launch_now(context)
        return self._instance.get_run_by_id(run_id) or context.dagster_run

    def _is_new(self, run_id: str) -> bool:
        run = self._instance.get_run_by_id(run_id)
        return run is not None and run.status is DagsterRunStatus.NOT_STARTED

    def _launch_now(self, context: SubmitRunContext) -> None:
        """A launch that fails has marked the run as failed, as the queue does; to raise would tell it twice."""
        run_id = context.dagster_run.run_id
        try:
            self._instance.launch_run(run_id, context.workspace)
        except Exception:
            run = self._instance.get_run_by_id(run_id)
            if run is None or not run.is_finished:
                raise
            extra = {"action": "launch-run", "run": run_id}
            log.exception("run %s could not be launched", run_id, extra=extra)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a limit on runs of Dagster's engine in the place of one on all runs."""
    if config.get("max_concurrent_runs") is not None:
        return dict(config)
    limits: list[Mapping[str, Any]] = list(config.get("tag_concurrency_limits") or ())
    if all(limit["key"] != DRIVER_TAG for limit in limits):
        limits.append({"key": DRIVER_TAG, "value": BY_DAGSTER, "limit": ENGINE_RUN_LIMIT})
    return {**config, "max_concurrent_runs": NO_LIMIT, "tag_concurrency_limits": limits}
