"""The ten configuration files (CONTRACT 4.4) and the platform's environment variables (CONTRACT 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from valohai_agent.protocol import Job
from valohai_agent.workspace import Workspace


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
    """Writes execution, inputs, parameters, runtime and api, each as .json and .yaml with equal content."""
    raise NotImplementedError


def build_environment(
    job: Job, *, secrets: Mapping[str, str], valohai_dir: str, facts: HostFacts
) -> dict[str, str]:
    """The command's variables, low to high: job and secrets, then the identity variables, which nobody overrides
    (K-73). PYTHONUNBUFFERED=1 unless given (C-28); VALOHAI_PORT is never set (K-12)."""
    raise NotImplementedError


def switch(environment: Mapping[str, str], name: str) -> bool:
    """Whether an agent switch of CONTRACT 4.3 is on: `1`, `yes` or `true`."""
    raise NotImplementedError
