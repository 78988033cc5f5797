"""Makes runs of an installation's project and hands them over, as the webserver does, in numbers."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from dagster import AssetKey, DagsterInstance
from dagster._core.definitions.selector import JobSubsetSelector
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.utils import make_new_run_id
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster_graphql.implementation.external import get_remote_execution_plan_or_raise

THREADS = 4
PROJECT = "load"
DEFS = f"""\
from pathlib import Path
from valohai_dagster import load_valohai_project
defs = load_valohai_project(Path(__file__).parent / "project", name="{PROJECT}")
"""


class Launchpad:
    """Lives in the environment of an installation (`Installation.entered`). Use as a context manager."""

    def __init__(self, root: Path, *, defs: str = DEFS, threads: int = THREADS) -> None:
        file = root / "defs.py"
        file.write_text(textwrap.dedent(defs))
        self.instance = DagsterInstance.get()
        # Pooled connections, as in a webserver: opening one per statement would be most of the work.
        self.instance.optimize_for_webserver(
            statement_timeout=60_000, pool_recycle=3600, max_overflow=2 * threads
        )
        target = LoadableTargetOrigin(
            python_file=str(file), working_directory=str(root), attribute="defs"
        )
        origin = InProcessCodeLocationOrigin(target, location_name=PROJECT)
        load_target = InProcessWorkspaceLoadTarget([origin])
        self._workspace = WorkspaceProcessContext(self.instance, load_target)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Launchpad:
        self._workspace.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._workspace.__exit__(kind, error, trace)
        self.instance.dispose()

    def create(self, number: int, steps: Sequence[str]) -> list[str]:
        """Run ids of that many runs that materialize these steps' assets."""
        make = self._maker(steps)
        return list(self._pool.map(lambda _: make(), range(number)))

    def hand_over(
        self, run_ids: Iterable[str], *, told: Callable[[str], None] = lambda run_id: None
    ) -> None:
        """Returns when all are accepted; `told` hears of each."""

        def launch(run_id: str) -> None:
            self.instance.launch_run(run_id, self._workspace.create_request_context())
            told(run_id)

        for _ in self._pool.map(launch, run_ids):
            pass

    def _maker(self, steps: Sequence[str]) -> Callable[[], str]:
        """What the webserver works out for each launch is the same for all of these."""
        request = self._workspace.create_request_context()
        keys = [AssetKey([PROJECT, step]) for step in steps]
        selector = JobSubsetSelector(
            location_name=PROJECT,
            repository_name="__repository__",
            job_name="__ASSET_JOB",
            op_selection=None,
            asset_selection=keys,
            asset_check_selection=None,
        )
        job = asyncio.run(request.gen_job(selector))
        plan = get_remote_execution_plan_or_raise(
            graphql_context=request,
            remote_job=job,
            run_config={},
            step_keys_to_execute=None,
            known_state=None,
        ).execution_plan_snapshot
        common: dict[str, Any] = {
            "job_name": "__ASSET_JOB",
            "job_snapshot": job.job_snapshot,
            "parent_job_snapshot": job.parent_job_snapshot,
            "execution_plan_snapshot": plan,
            "step_keys_to_execute": plan.step_keys_to_execute,
            "asset_selection": frozenset(keys),
            "asset_check_selection": None,
            "op_selection": None,
            "resolved_op_selection": None,
            "run_config": {},
            "tags": job.tags,
            "root_run_id": None,
            "parent_run_id": None,
            "status": DagsterRunStatus.NOT_STARTED,
            "remote_job_origin": job.get_remote_origin(),
            "job_code_origin": job.get_python_origin(),
            "asset_graph": request.asset_graph,
        }
        return lambda: self.instance.create_run(run_id=make_new_run_id(), **common).run_id
