"""Ways to run a command: containers (docker), or plain processes where there is no container engine."""

from __future__ import annotations

from pathlib import Path

from valohai_agent.errors import RuntimeUnavailable
from valohai_agent.runtimes.base import ExitStatus, Running, RunSpec, Runtime

__all__ = ["ExitStatus", "RunSpec", "Running", "Runtime", "select_runtime"]


def select_runtime(name: str, *, work_dir: Path, slots: int = 1) -> Runtime:
    """For `slots` jobs at a time. `auto` takes docker if its daemon answers, else process; `docker` and `process` insist.

    Raises RuntimeUnavailable with the reason of each that was tried.
    """
    if name not in ("auto", "docker", "process"):
        raise RuntimeUnavailable(f"There is no runtime {name!r}; use auto, docker or process.")
    reasons = []
    for candidate in ("docker", "process") if name == "auto" else (name,):
        runtime = _make(candidate, work_dir, slots)
        reason = runtime.available()
        if reason is None:
            return runtime
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeUnavailable(
        f"No runtime is usable on this machine ({'; '.join(reasons)}). "
        "Run `valohai-dagster doctor` for details."
    )


def _make(name: str, work_dir: Path, slots: int) -> Runtime:
    if name == "docker":
        from valohai_agent.runtimes.docker import DockerRuntime

        return DockerRuntime()
    from valohai_agent.runtimes.process import ProcessRuntime

    return ProcessRuntime(work_dir, slots=slots)
