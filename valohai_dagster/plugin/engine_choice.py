"""Which engine drives a run: the conductor, or Dagster's own. Decided from snapshots, so without user code.

Run coordinator and launcher ask the same question and must get the same answer: a run is ours when every step that it
executes is one (DAGSTER_NOTES 1 and 2). Everything else works too, on Dagster's engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import TYPE_CHECKING

from valohai_dagster.plugin.step_tag import DAGSTER_ENGINE, ENGINE_TAG, STEP_TAG, TAG_VERSION

if TYPE_CHECKING:
    from dagster import DagsterInstance, DagsterRun

    from valohai_dagster.plugin.compat import ExecutionPlanSnapshot, JobSnap

REMEMBERED = 512  # answers; a backfill asks for the same two snapshots once per partition
_COMPUTE = "COMPUTE"  # the step kind that is neither mapped nor collected
_CONSOLE = "console"  # Dagster's default logger

_answers: dict[tuple[str, str], str | None] = {}
_lock = Lock()


def is_ours(job: JobSnap, plan: ExecutionPlanSnapshot, run: DagsterRun) -> bool:
    """Whether the conductor drives this run."""
    return why_not_ours(job, plan, run) is None


def why_not_ours(job: JobSnap, plan: ExecutionPlanSnapshot, run: DagsterRun) -> str | None:
    """Why Dagster's own engine must run it, in words; None when it is ours."""
    return _asked_otherwise(run) or _unfit(job, plan)


def why_not_driven(instance: DagsterInstance, run: DagsterRun) -> str | None:
    """`why_not_ours` for a run of an instance. Snapshots never change, so what they say is remembered."""
    job_id, plan_id = run.job_snapshot_id, run.execution_plan_snapshot_id
    if job_id is None or plan_id is None:
        return "it has no snapshot of its job or plan"
    if asked := _asked_otherwise(run):
        return asked
    with _lock:
        if (job_id, plan_id) in _answers:
            return _answers[job_id, plan_id]
    job, plan = (
        instance.get_job_snapshot(job_id),
        instance.get_execution_plan_snapshot(plan_id),
    )
    answer = _unfit(job, plan) if job and plan else "its snapshots are gone"
    with _lock:
        if len(_answers) >= REMEMBERED:
            _answers.clear()
        _answers[job_id, plan_id] = answer
    return answer


def _asked_otherwise(run: DagsterRun) -> str | None:
    """What this one run asks for beyond its snapshots."""
    if run.tags.get(ENGINE_TAG) == DAGSTER_ENGINE:
        return f"its tag {ENGINE_TAG} asks for Dagster's engine"
    loggers = run.run_config.get("loggers") or {}
    others = sorted(set(loggers) - {_CONSOLE}) if isinstance(loggers, Mapping) else []
    return f"its config names the logger {others[0]!r}" if others else None


def _unfit(job: JobSnap, plan: ExecutionPlanSnapshot) -> str | None:
    if job.tags.get(ENGINE_TAG) == DAGSTER_ENGINE:
        return f"its job's tag {ENGINE_TAG} asks for Dagster's engine"
    selected = set(plan.step_keys_to_execute)
    if not selected:
        return "it has no step to execute"
    resources = dict(_resources_by_handle(job))
    for step in plan.steps:
        if step.key not in selected:
            continue
        if not _readable((step.tags or {}).get(STEP_TAG)):
            return f"step {step.key} is not a step of a valohai.yaml that this release can read"
        dynamic = any(output.properties and output.properties.is_dynamic for output in step.outputs)
        if dynamic or step.kind.value != _COMPUTE:
            return f"step {step.key} is dynamic"
        if needed := resources.get(step.node_handle_id, ["an op that its job does not show"]):
            return f"step {step.key} needs {', '.join(sorted(needed))}"
    return None


def _readable(tag: str | None) -> bool:
    """Code locations may be newer than the control plane; then their own compute function does the work."""
    try:
        return tag is not None and json.loads(tag)["v"] == TAG_VERSION
    except (ValueError, TypeError, KeyError):
        return False


def _resources_by_handle(job: JobSnap) -> Iterator[tuple[str, list[str]]]:
    """Required resources of every op by its node handle (`graph.op`), ops inside of graphs included."""
    nodes = job.node_defs_snapshot
    ops = {op.name: list(op.required_resource_keys) for op in nodes.op_def_snaps}
    graphs = {graph.name: graph.dep_structure_snapshot for graph in nodes.graph_def_snaps}
    waiting = [("", job.dep_structure_snapshot)]
    while waiting:
        prefix, structure = waiting.pop()
        for node in structure.node_invocation_snaps:
            handle = prefix + node.node_name
            if node.node_def_name in ops:
                yield handle, ops[node.node_def_name]
            elif node.node_def_name in graphs:
                waiting.append((handle + ".", graphs[node.node_def_name]))
