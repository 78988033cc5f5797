"""What the snapshots of a job and a plan say: read once, shared by all runs of that job and selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dagster import DagsterInstance, DagsterRun

from valohai_dagster.errors import ValohaiError
from valohai_dagster.plugin.compat import JobSnap
from valohai_dagster.plugin.compat.engine import (
    ExecutionPlan,
    ExecutionStep,
    pool_of,
)
from valohai_dagster.plugin.step_tag import STEP_TAG, StepTag, read_step_tag

REMEMBERED = 256


class SnapshotMissing(ValohaiError):
    """The run's snapshots are not in the storage (any more)."""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    step: ExecutionStep
    tag: StepTag
    path: tuple[str, ...]  # of node names, outermost first: where its config is
    output_types: Mapping[str, str]  # output -> display name of its type
    check_outputs: Mapping[str, str]  # asset check -> its output
    pool: str | None


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    job: JobSnap
    plan: ExecutionPlan  # holds no state of a run
    steps: Mapping[str, StepFacts]  # those to execute, by key

    @property
    def has_pools(self) -> bool:
        return any(facts.pool for facts in self.steps.values())


def facts_of(instance: DagsterInstance, run: DagsterRun) -> JobFacts:
    """Raises `SnapshotMissing` when the run cannot be driven from what is stored."""
    job_id, plan_id = run.job_snapshot_id, run.execution_plan_snapshot_id
    if job_id is None or plan_id is None:
        raise SnapshotMissing(
            f"run {run.run_id} has no snapshot of its job or plan; launch it again"
        )
    return _facts(_Storage(instance), job_id, plan_id, run.job_name)


class _Storage:
    """All instances are the same to the cache: snapshot ids are digests of the content."""

    def __init__(self, instance: DagsterInstance) -> None:
        self.instance = instance

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Storage)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=REMEMBERED)
def _facts(storage: _Storage, job_id: str, plan_id: str, job_name: str) -> JobFacts:
    job = storage.instance.get_job_snapshot(job_id)
    snapshot = storage.instance.get_execution_plan_snapshot(plan_id)
    if job is None or snapshot is None:
        raise SnapshotMissing(f"the snapshots of job {job_name} are gone; launch the run again")
    plan = ExecutionPlan.rebuild_from_snapshot(job_name, snapshot)
    ops = {op.name: op for op in job.node_defs_snapshot.op_def_snaps}
    steps: dict[str, StepFacts] = {}
    for key in plan.step_keys_to_execute:
        step: Any = plan.get_step_by_key(key)
        op = ops.get(step.node_handle.name)
        steps[key] = StepFacts(
            step=step,
            tag=read_step_tag(step.tags[STEP_TAG]),
            path=tuple(step.node_handle.path),
            output_types=_output_types(job, op),
            check_outputs={
                out.properties.asset_check_key.name: out.name
                for out in step.step_outputs
                if out.properties.asset_check_key is not None
            },
            pool=pool_of(step),
        )
    return JobFacts(job=job, plan=plan, steps=steps)


def _output_types(job: JobSnap, op: Any) -> dict[str, str]:
    """Ops that were renamed where they are used are not found by name; all of ours yield `Any`."""
    types = job.dagster_type_namespace_snapshot
    return {
        out.name: types.get_dagster_type_snap(out.dagster_type_key).display_name
        for out in (op.output_def_snaps if op is not None else ())
    }
