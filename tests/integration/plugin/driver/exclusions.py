"""What the comparison of engine and conductor leaves out, each with its reason (DAGSTER_NOTES 12)."""

from __future__ import annotations

from dataclasses import replace

from tests.support.observed_runs import Exclusions

MULTIPROCESS = Exclusions(
    kinds={
        "ENGINE_EVENT": "each engine tells of its own work; what ours must tell has tests of its own",
        "RESOURCE_INIT_STARTED": "the conductor opens no resources of user code, so there is nothing to tell",
        "RESOURCE_INIT_SUCCESS": "as above",
        "RESOURCE_INIT_FAILURE": "as above",
    },
    wording={
        "STEP_WORKER_STARTING": "there a process is started, here a place in a queue is taken",
        "STEP_WORKER_STARTED": "there a process tells its pid, here the worker its name",
    },
    lines={
        "execution ": "our own lines on the way of an execution; the conductor tells them as engine events",
    },
    fields={
        "timestamp": "a time",
        "pid": "a process",
        "duration_ms": "a duration",
        "stack": "a stack trace: the conductor has no frames of user code",
        "log_key": "a random name; what the log shows is compared by reading it",
        "execution_plan_snapshot_id": "a digest of the plan, which names the ids of earlier runs",
        "run_config": "names the engine's executor; the steps' own config is the same by construction",
    },
    entries={
        "seconds/*": "durations of the execution",
        "pid": "a process",
    },
    texts={
        "duration": r"(?<= in )(?:\d+[hm])*\d+(?:\.\d+)?m?s\b|(?<= in )\d+:\d+\S*",
        "pid": r"(?<=\(pid: )\d+(?=\))",
        "port": r"(?<=http://127\.0\.0\.1:)\d+",
    },
)

_ONE_PROCESS = (
    "the in-process executor has one process for all steps; compared with the multiprocess one"
)
IN_PROCESS = replace(
    MULTIPROCESS,
    kinds={
        **MULTIPROCESS.kinds,
        "LOGS_CAPTURED": _ONE_PROCESS,
        "STEP_WORKER_STARTING": _ONE_PROCESS,
        "STEP_WORKER_STARTED": _ONE_PROCESS,
    },
)
