"""One Dagster instance with a deployment of ours behind it, in this process: to run one thing in two ways.

`EngineSide` runs on Dagster's own engine, `ConductorSide` (see `conductor.py`) through the conductor. Everything
before the launch is the same code for both, and the same that Dagster's webserver and daemon use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import AssetCheckKey, AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.definitions.selector import JobSubsetSelector
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext, WorkspaceRequestContext
from dagster._core.workspace.load_target import (
    InProcessWorkspaceLoadTarget,
    PythonFileTarget,
    WorkspaceLoadTarget,
)
from dagster._daemon.backfill import execute_backfill_iteration
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import (
    QueuedRunCoordinatorDaemon,
)
from dagster_graphql.implementation.execution.run_lifecycle import create_valid_pipeline_run
from dagster_graphql.implementation.utils import ExecutionMetadata, ExecutionParams
from typing_extensions import Self

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService
from tests.support.sim_worker import Plays, SimWorker, sim_worker
from valohai_dagster.settings import Settings, load_settings

log = logging.getLogger(__name__)
RUN_SECONDS = 120.0  # with everything else that a machine does meanwhile
LOCATION = "same"
QUEUED = {
    "run_coordinator": {"module": "dagster._core.run_coordinator", "class": "QueuedRunCoordinator"}
}
ONE_AT_A_TIME = {
    "run_coordinator": {
        **QUEUED["run_coordinator"],
        "config": {
            "max_concurrent_runs": 1,
            "block_op_concurrency_limited_runs": {"enabled": False},
        },
    }
}
DEFS = """
from pathlib import Path

from valohai_dagster import load_valohai_project

defs = load_valohai_project(Path(__file__).parent / "digits")
"""


@dataclass(frozen=True, kw_only=True)
class Code:
    """A code location on disk: `defs.py` beside the project `digits`."""

    file: Path

    @classmethod
    def write(cls, root: Path, yaml: str, *, defs: str = DEFS) -> Code:
        project = root / "digits"
        project.mkdir(parents=True)
        (project / "valohai.yaml").write_text(textwrap.dedent(yaml))
        file = root / "defs.py"
        file.write_text(textwrap.dedent(defs))
        return cls(file=file)

    def load_target(self, *, server: bool = False) -> WorkspaceLoadTarget:
        """Loads it into this process, which is quick; with `server` into a code server, which default launchers need."""
        if server:
            return PythonFileTarget(str(self.file), "defs", str(self.file.parent), LOCATION)
        origin = LoadableTargetOrigin(
            python_file=str(self.file), working_directory=str(self.file.parent), attribute="defs"
        )
        return InProcessWorkspaceLoadTarget(
            InProcessCodeLocationOrigin(origin, location_name=LOCATION)
        )

    @property
    def yaml(self) -> Path:
        return self.file.parent / "digits" / "valohai.yaml"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One run as a user asks for it."""

    assets: Sequence[str] = ()  # step names as asset keys of project digits; empty: the whole job
    checks: Sequence[tuple[str, str]] | None = None  # (step, check); None: those of the assets
    job: str = "__ASSET_JOB"
    ops: Mapping[str, Any] = field(default_factory=dict)  # config by op
    execution: Mapping[str, Any] = field(default_factory=dict)  # the executor's config
    tags: Mapping[str, str] = field(default_factory=dict)
    partition: str | None = None
    parent: str | None = None  # a run that this one executes again
    from_failure: bool = False
    step_keys: Sequence[str] | None = None


def key_of(step: str) -> AssetKey:
    return AssetKey(["digits", step])


class Side:
    """Use as a context manager, one after the other: each sets DAGSTER_HOME and the deployment's environment."""

    name = "side"

    def __init__(
        self,
        root: Path,
        code: Code,
        plays: Plays,
        redis_server: RedisServer,
        *,
        server: bool = False,
        new_database: Callable[[], str] | None = None,
        **options: Any,
    ) -> None:
        """`new_database` gives the URL of an empty Postgres database; without it everything is in SQLite files."""
        self.root, self.code, self.plays = root, code, plays
        self.redis_server = redis_server
        self._server = server
        self._new_database = new_database
        self.options = options  # of the Dagster instance, as in dagster.yaml
        self.instance: DagsterInstance
        self.context: WorkspaceProcessContext
        self.service: RunningService
        self.worker: SimWorker
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            stack.enter_context(self._environment())
            home = self.root / "dagster"
            home.mkdir(parents=True)
            overrides = {**self.instance_options(), **self._storage(), **self.options}
            self.instance = stack.enter_context(
                dg.instance_for_test(overrides=overrides, temp_dir=str(home))
            )
            self.service = stack.enter_context(self.start_service(load_settings()))
            client = stack.enter_context(self.redis_server.client())
            self.worker = stack.enter_context(
                sim_worker(client, self.service.keys, self.plays, group="local")
            )
            self._forget_loaded()
            self.context = stack.enter_context(
                WorkspaceProcessContext(self.instance, self.code.load_target(server=self._server))
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        config = self.root / "valohai.toml"
        self.root.mkdir(parents=True, exist_ok=True)
        lines = [f'redis_url = "{self.redis_server.unix_url}"']
        if self._new_database is not None:
            lines.append(f'database_url = "{self._new_database()}"')
        config.write_text("\n".join([*lines, "[groups.local]", 'kind = "static"', ""]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VALOHAI_CONFIG", str(config))
            patch.setenv("VALOHAI_STATE", str(self.root / "state"))
            patch.setenv("DAGSTER_HOME", str(self.root / "dagster"))
            yield

    def _storage(self) -> dict[str, Any]:
        if self._new_database is None:
            return {}
        return {"storage": {"postgres": {"postgres_url": self._new_database()}}}

    def instance_options(self) -> dict[str, Any]:
        return {
            "run_coordinator": {
                "module": "dagster._core.run_coordinator",
                "class": "DefaultRunCoordinator",
            },
            "compute_logs": {
                "module": "valohai_dagster.plugin.compute_logs",
                "class": "ValohaiComputeLogManager",
            },
        }

    @contextlib.contextmanager
    def start_service(self, settings: Settings) -> Iterator[RunningService]:
        service = RunningService(settings).start()
        try:
            yield service
        finally:
            service.close()

    # -- definitions -------------------------------------------------------------------------------------------

    def edit_project(self, old: str, new: str) -> None:
        """Replaces text in valohai.yaml, then reloads the code location."""
        self.code.yaml.write_text(self.code.yaml.read_text().replace(old, new))
        self.reload()

    def reload(self) -> None:
        self._forget_loaded()
        self.context.refresh_workspace()

    @staticmethod
    def _forget_loaded() -> None:
        """Loading into this process remembers the module, and the engine the job that it ran last."""
        sys.modules.pop("defs", None)
        ReconstructableJob.get_definition.cache_clear()
        ReconstructableJob.get_repository_definition.cache_clear()

    def staleness(self) -> dict[str, str]:
        """Step -> FRESH, STALE or MISSING, as the UI's asset graph shows it."""
        request = self.request()
        graph = request.asset_graph
        resolver = CachingStaleStatusResolver(self.instance, graph, request)
        keys = graph.materializable_asset_keys
        return {key.path[-1]: resolver.get_status(key).value for key in keys}

    # -- runs --------------------------------------------------------------------------------------------------

    def request(self) -> WorkspaceRequestContext:
        return self.context.create_request_context()

    def create(self, ask: Ask) -> DagsterRun:
        """The run record that the webserver would make."""
        selector = JobSubsetSelector(
            location_name=LOCATION,
            repository_name="__repository__",
            job_name=ask.job,
            op_selection=None,
            asset_selection=[key_of(step) for step in ask.assets] or None,
            asset_check_selection=_check_keys(ask.checks),
        )
        parent = self.instance.get_run_by_id(ask.parent) if ask.parent else None
        tags = dict(ask.tags)
        if ask.partition is not None:
            tags["dagster/partition"] = ask.partition
        if parent is not None:
            tags["dagster/parent_run_id"] = parent.run_id
            tags["dagster/root_run_id"] = parent.root_run_id or parent.run_id
        if ask.from_failure:
            tags["dagster/is_resume_retry"] = "true"
        params = ExecutionParams(
            selector=selector,
            run_config=self.run_config(ask),
            mode="default",
            execution_metadata=ExecutionMetadata(
                run_id=None,
                tags=tags,
                root_run_id=(parent.root_run_id or parent.run_id) if parent else None,
                parent_run_id=parent.run_id if parent else None,
            ),
            step_keys=list(ask.step_keys) if ask.step_keys else None,
        )
        request = self.request()
        job = asyncio.run(request.gen_job(selector))
        return create_valid_pipeline_run(request, job, params)

    def run_config(self, ask: Ask) -> dict[str, Any]:
        config: dict[str, Any] = {"ops": dict(ask.ops)} if ask.ops else {}
        if ask.execution:
            config["execution"] = {"config": dict(ask.execution)}
        return config

    def launch(self, run: DagsterRun) -> None:
        self.instance.launch_run(run.run_id, self.request())

    def submit(self, run: DagsterRun) -> None:
        """As the webserver does: through the run coordinator."""
        self.instance.submit_run(run.run_id, self.request())

    def ended(self, run_id: str, *, seconds: float = RUN_SECONDS) -> DagsterRun:
        def finished() -> DagsterRun | None:
            run = self.instance.get_run_by_id(run_id)
            return run if run is not None and run.is_finished else None

        found = wait_for(finished, seconds=seconds, what=f"the end of run {run_id}")
        assert found is not None
        return found

    def kinds(self, run_id: str) -> list[str]:
        """Types of the run's events."""
        records = self.instance.get_records_for_run(run_id).records
        events = [record.event_log_entry.dagster_event for record in records]
        return [event.event_type_value for event in events if event is not None]

    def wait_for_event(self, run_id: str, kind: str, step_key: str | None = None) -> None:
        def found() -> bool:
            records = self.instance.get_records_for_run(run_id).records
            entries = [record.event_log_entry for record in records]
            return any(
                entry.dagster_event is not None
                and entry.dagster_event.event_type_value == kind
                and entry.step_key == step_key
                for entry in entries
            )

        wait_for(found, seconds=RUN_SECONDS, what=f"{kind} of {step_key or run_id}")

    def run(self, ask: Ask) -> DagsterRun:
        run = self.create(ask)
        self.launch(run)
        return self.ended(run.run_id)

    def backfill(self, *steps: str, partitions: Sequence[str]) -> str:
        """A backfill as the UI requests it and Dagster's daemons carry it out, to its end; its id.

        Needs the queued run coordinator (see `QUEUED`), so that runs are launched from here.
        """
        graph = self.request().asset_graph
        made = PartitionBackfill.from_asset_partitions(
            backfill_id=f"backfill{len(self.instance.get_backfills())}",
            asset_graph=graph,
            partition_names=partitions,
            asset_selection=[key_of(step) for step in steps],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=self.instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=self.run_config(Ask()),
        )
        self.instance.add_backfill(made)
        deadline = time.monotonic() + RUN_SECONDS
        while self._in_progress(made.backfill_id):
            errors = [e for e in execute_backfill_iteration(self.context, log) if e]
            assert not errors, errors
            assert time.monotonic() < deadline, "the backfill does not end"
            self.dequeue()
            for run in self.instance.get_runs():
                if run.status is not DagsterRunStatus.QUEUED:
                    self.ended(run.run_id)
        return made.backfill_id

    def dequeue(self) -> None:
        """One look of the queue's daemon."""
        with QueuedRunCoordinatorDaemon(interval_seconds=1) as daemon:
            errors = [e for e in daemon.run_iteration(self.context) if e]
        assert not errors, errors

    def _in_progress(self, backfill_id: str) -> bool:
        found = self.instance.get_backfill(backfill_id)
        assert found is not None
        return found.status is BulkActionStatus.REQUESTED

    def terminate(self, run_id: str) -> None:
        """What the Terminate button does."""
        assert self.instance.run_launcher.terminate(run_id), f"run {run_id} did not take the stop"


class EngineSide(Side):
    """Dagster's own engine in this process: a launch returns when the run has ended."""

    name = "engine"

    def instance_options(self) -> dict[str, Any]:
        return {
            **super().instance_options(),
            "run_launcher": {
                "module": "dagster._core.launcher.sync_in_memory_run_launcher",
                "class": "SyncInMemoryRunLauncher",
            },
        }

    def run_config(self, ask: Ask) -> dict[str, Any]:
        config = super().run_config(ask)
        return {"execution": {"config": {"in_process": {}}}, **config}

    def terminate(self, run_id: str) -> None:
        """As the default launcher and the run's process do it; from another thread, for the run has the main one."""
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        self.instance.report_run_canceling(run)
        os.kill(os.getpid(), signal.SIGINT)


class MultiprocessSide(EngineSide):
    """Dagster's default executor: a process per step. Takes seconds per step."""

    name = "multiprocess"

    def run_config(self, ask: Ask) -> dict[str, Any]:
        config = super().run_config(ask)
        config["execution"] = {"config": {"multiprocess": {"max_concurrent": 4}}}
        return config


def _check_keys(checks: Sequence[tuple[str, str]] | None) -> list[AssetCheckKey] | None:
    if checks is None:
        return None
    return [AssetCheckKey(key_of(step), name) for step, name in checks]
