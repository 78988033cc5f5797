"""The ten configuration files (CONTRACT 4.4) and the platform's variables (CONTRACT 4.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from valohai_agent.processes import ATTEMPT_VARIABLE
from valohai_agent.protocol import Job
from valohai_agent.workspace import Workspace

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, where it was built
TRUE_VALUES = frozenset({"1", "yes", "true"})
FORBIDDEN = frozenset({"VALOHAI_PORT"})  # valohai-utils would think it is in a deployment (K-12)
TRACE_VARIABLES = {"traceparent": "TRACEPARENT", "tracestate": "TRACESTATE"}  # W3C trace context
CONFIG_KEYS = {  # identity variables that come from execution.json, when they apply
    "VH_TASK_ID": "valohai.task-id",
    "VH_PIPELINE_ID": "valohai.pipeline-id",
    "VH_PIPELINE_NODE_ID": "valohai.pipeline-node-id",
}


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """What `runtime.json` and VH_LOCAL_IP/VH_PUBLIC_IP tell about the worker; empty means unknown."""

    hostname: str = ""
    worker: str = ""
    agent_version: str = ""
    runtime: str = ""
    local_ip: str = ""
    public_ip: str = ""
    machine_id: str = ""


def write_config_files(
    workspace: Workspace,
    job: Job,
    *,
    inputs: Mapping[str, Any],
    api: Mapping[str, Any],
    facts: HostFacts,
) -> None:
    """Writes execution, inputs, parameters, runtime and api, each as .json and .yaml (K-30).

    Both files of a pair have equal content. Every declared input is listed, even with no files
    (K-35); parameters without a value are left out (K-32).
    """
    contents: dict[str, Mapping[str, Any]] = {
        "execution": job.execution_config,
        "inputs": {
            item.name: inputs.get(item.name, {"input_id": item.input_id, "files": []})
            for item in job.inputs
        },
        "parameters": {k: v for k, v in job.parameters.items() if v is not None},
        "runtime": _runtime(job, facts),
        "api": api,
    }
    for name, content in contents.items():
        _write_pair(workspace.config, name, content)


def build_environment(
    job: Job, *, secrets: Mapping[str, str], valohai_dir: str, facts: HostFacts
) -> dict[str, str]:
    """The command's variables: secrets, then the job's own, then the identity variables (K-73).

    Nobody overrides the identity variables of CONTRACT 4.2; the agent switches of 4.3 users may set.
    PYTHONUNBUFFERED=1 unless given (C-28); TRACEPARENT where the control plane sends spans; VALOHAI_PORT is never set (K-12).
    """
    trace = {TRACE_VARIABLES[k]: v for k, v in job.trace.items() if k in TRACE_VARIABLES}
    environment = {"PYTHONUNBUFFERED": "1", **trace, **secrets, **job.environment_variables}
    environment.update(_identity(job, valohai_dir, facts))
    return {k: v for k, v in environment.items() if k not in FORBIDDEN}


def switch(environment: Mapping[str, str], name: str) -> bool:
    """Whether an agent switch of CONTRACT 4.3 is on: `1`, `yes` or `true`."""
    return environment.get(name, "").strip().lower() in TRUE_VALUES


def write_preemption(
    workspace: Workspace, what: str, gone_at: datetime | None, seconds_left: float | None
) -> None:
    """An eleventh file, for commands that want to know how much time an interrupt leaves them (K-53)."""
    when = gone_at.isoformat() if gone_at else None
    content = {"reason": what, "gone_at": when, "seconds_left": seconds_left}
    _write_pair(workspace.config, "preemption", content)


def _identity(job: Job, valohai_dir: str, facts: HostFacts) -> dict[str, str]:
    root = valohai_dir.rstrip("/")
    values = {
        "VH_CONFIG_DIR": f"{root}/config",
        "VH_INPUTS_DIR": f"{root}/inputs",
        "VH_OUTPUTS_DIR": f"{root}/outputs",
        "VH_REPOSITORY_DIR": f"{root}/repository",
        "VH_JOB_ID": f"exec-{job.execution_id}",
        "VH_EXECUTION_ID": job.execution_id,
        "VH_PROJECT_ID": job.project_id,
        ATTEMPT_VARIABLE: str(job.attempt),
    }
    for variable, key in CONFIG_KEYS.items():
        if job.execution_config.get(key):
            values[variable] = str(job.execution_config[key])
    if facts.local_ip or facts.public_ip:
        values["VH_LOCAL_IP"] = facts.local_ip or facts.public_ip
        values["VH_PUBLIC_IP"] = facts.public_ip or facts.local_ip
    return values


def _runtime(job: Job, facts: HostFacts) -> dict[str, Any]:
    """K-37, whose content is ours to choose."""
    return {
        "agent": {"name": facts.worker, "version": facts.agent_version, "runtime": facts.runtime},
        "hostname": facts.hostname,
        "machine_id": facts.machine_id,
        "image": job.image,
        "environment_slug": job.execution_config.get("valohai.environment-slug"),
        "queue": job.group,
    }


def _write_pair(directory: Path, name: str, content: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(content), default=str))
    (directory / f"{name}.json").write_text(
        json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (directory / f"{name}.yaml").write_text(
        yaml.dump(plain, Dumper=_DUMPER, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
