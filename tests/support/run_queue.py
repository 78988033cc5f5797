"""Dagster's run queue without processes: an instance, one code location, its real daemon, a launcher that only notes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.definitions.selector import JobSubsetSelector
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from dagster_graphql.implementation.execution.run_lifecycle import create_valid_pipeline_run
from dagster_graphql.implementation.utils import ExecutionMetadata, ExecutionParams

from valohai_dagster.plugin.compat import LaunchRunContext
from valohai_dagster.plugin.coordinator import ValohaiRunCoordinator
from valohai_dagster.plugin.launcher import ValohaiRunLauncher

LOCATION = "queue"
DEFS = """
import json
import dagster as dg

TAG = {"valohai/step": json.dumps({"v": 1})}

@dg.asset(op_tags=TAG)
def ours(): ...

@dg.asset(op_tags=TAG, pool="gpu")
def pooled(): ...

@dg.asset(op_tags=TAG, deps=["ours"])
def after(): ...

@dg.asset
def plain(): ...

defs = dg.Definitions(
    assets=[ours, pooled, after, plain],
    jobs=[dg.define_asset_job("hooked", ["ours"], tags={"valohai/engine": "dagster"})],
)
"""


class NotingLauncher(ValohaiRunLauncher):
    """Launches nothing; `during` is called with the run's id while it does."""

    launched: ClassVar[list[str]] = []
    during: ClassVar[Callable[[str], None]] = lambda run_id: None

    def launch_run(self, context: LaunchRunContext) -> None:
        type(self).during(context.dagster_run.run_id)
        self.launched.append(context.dagster_run.run_id)

    def terminate(self, run_id: str) -> bool:
        return False


class RunQueue:
    """One instance with `ValohaiRunCoordinator`; `daemon_tick` is one iteration of the queue's daemon."""

    def __init__(self, instance: DagsterInstance, context: WorkspaceProcessContext) -> None:
        self.instance = instance
        self.context = context
        self._daemon = QueuedRunCoordinatorDaemon(interval_seconds=1)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        directory: Path,
        coordinator: Mapping[str, Any] | None = None,
        *,
        launcher: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[RunQueue]:
        file = directory / "queue_defs.py"
        file.write_text(DEFS)
        overrides = {
            "run_coordinator": {
                "module": ValohaiRunCoordinator.__module__,
                "class": ValohaiRunCoordinator.__name__,
                "config": dict(coordinator or {}),
            },
            "run_launcher": launcher
            or {"module": NotingLauncher.__module__, "class": NotingLauncher.__name__},
            **options,
        }
        NotingLauncher.launched, NotingLauncher.during = [], lambda run_id: None
        target = InProcessWorkspaceLoadTarget(
            InProcessCodeLocationOrigin(
                LoadableTargetOrigin(
                    python_file=str(file), working_directory=str(directory), attribute="defs"
                ),
                location_name=LOCATION,
            )
        )
        with (
            dg.instance_for_test(overrides=overrides) as instance,
            WorkspaceProcessContext(instance, target) as context,
        ):
            yield cls(instance, context)

    @property
    def launched(self) -> list[str]:
        return NotingLauncher.launched

    def create(
        self,
        *assets: str,
        job: str = "__ASSET_JOB",
        config: Mapping[str, Any] | None = None,
        **tags: str,
    ) -> DagsterRun:
        """The run record that the webserver makes of a launch."""
        selector = JobSubsetSelector(
            location_name=LOCATION,
            repository_name="__repository__",
            job_name=job,
            op_selection=None,
            asset_selection=[AssetKey(name) for name in assets] or None,
        )
        params = ExecutionParams(
            selector=selector,
            run_config=dict(config or {}),
            mode="default",
            execution_metadata=ExecutionMetadata(run_id=None, tags=tags),
            step_keys=None,
        )
        request = self.context.create_request_context()
        return create_valid_pipeline_run(request, asyncio.run(request.gen_job(selector)), params)

    def submit(self, run: DagsterRun) -> DagsterRun:
        return self.instance.submit_run(run.run_id, self.context.create_request_context())

    def launch(self, *assets: str, **options: Any) -> DagsterRun:
        """Created and submitted; as it stands then."""
        return self.submit(self.create(*assets, **options))

    def daemon_tick(self) -> list[str]:
        """The runs that one iteration of the real daemon has launched."""
        before = len(self.launched)
        list(self._daemon.run_iteration(self.context))
        return self.launched[before:]

    def end(self, run: DagsterRun) -> None:
        self.instance.report_run_canceled(self.reload(run))

    def reload(self, run: DagsterRun) -> DagsterRun:
        found = self.instance.get_run_by_id(run.run_id)
        assert found is not None
        return found

    def status(self, run: DagsterRun) -> DagsterRunStatus:
        return self.reload(run).status

    def events(self, run: DagsterRun) -> list[str]:
        """Types of the run's events, the planned ones left out."""
        entries = self.instance.all_logs(run.run_id)
        kinds = [str(entry.get_dagster_event().event_type_value) for entry in entries]
        return [kind for kind in kinds if not kind.endswith("_PLANNED")]
