"""Ways to run a command: containers (docker), or plain processes where there is no container engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from valohai_agent.runtimes.base import ExitStatus, Running, RunSpec, Runtime

__all__ = ["ExitStatus", "Running", "RunSpec", "Runtime", "select_runtime"]


def select_runtime(name: Literal["auto", "docker", "process"] | str, *, work_dir: Path) -> Runtime:
    """`auto` takes docker if its daemon answers, else process. Raises RuntimeUnavailable with all reasons."""
    raise NotImplementedError
