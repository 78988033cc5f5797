"""Whether and how a process can see its private directories as `/valohai`."""

from __future__ import annotations

import functools
import marshal
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valohai_agent.protocol import JobMount
from valohai_agent.workspace import Workspace

ENTRY = Path(__file__).with_name("namespace_entry.py")
PROBE_SECONDS = 20
_PROBE = "echo x > /valohai/outputs/x && ! (echo x > /valohai/inputs/x) 2>/dev/null"


@dataclass(frozen=True, kw_only=True)
class Bind:
    source: str
    target: str
    readonly: bool = False


@functools.lru_cache(maxsize=1)
def available() -> str | None:
    """None if this machine lets us bind `/valohai`, else the reason. Tried once per process."""
    if platform.system() != "Linux":
        return "mount namespaces need Linux"
    with tempfile.TemporaryDirectory(prefix="valohai-probe-") as directory:
        base = Path(directory)
        binds = [
            Bind(source=str(_made(base / name)), target=f"/valohai/{name}", readonly=readonly)
            for name, readonly in (("outputs", False), ("inputs", True))
        ]
        argv = prepare(base, binds, ["/bin/sh", "-c", _PROBE], cwd="/valohai/outputs")
        return _probe(argv, base)


def _probe(argv: Sequence[str], base: Path) -> str | None:
    try:
        result = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, text=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode == 0 and (base / "outputs" / "x").exists():
        return None
    reason = failure(base) or result.stderr.strip() or f"exit code {result.returncode}"
    return f"mount namespaces are not available here ({reason})"


def entry_spec(
    run: Path,
    binds: Sequence[Bind],
    argv: Sequence[str],
    *,
    cwd: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `namespace_entry` needs to start `argv`; without `environment` that of its own process.

    Raises ValueError for what no process can be given.
    """
    variables = None if environment is None else _encoded(environment)
    return {
        "root": str(_made(run / "root")),
        "binds": [asdict(bind) for bind in binds],
        "cwd": cwd,
        "argv": list(argv),
        "environment": variables,
        "error_file": str(run / "namespace.error"),
    }


def _encoded(environment: Mapping[str, str]) -> dict[bytes, bytes]:
    for name, value in environment.items():
        if "\0" in name + value or "=" in name:
            raise ValueError(
                f"the variable {name!r} cannot be set: it holds a NUL, or its name a `=`"
            )
    return {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}


def prepare(run: Path, binds: Sequence[Bind], argv: Sequence[str], *, cwd: str) -> list[str]:
    """Writes the spec below `run`; gives the command line that starts `argv` in the namespace."""
    path = run / "namespace.spec"
    path.write_bytes(marshal.dumps(entry_spec(run, binds, argv, cwd=cwd)))
    return [sys.executable, "-I", "-S", str(ENTRY), str(path)]


def failure(run: Path) -> str | None:
    """Why the namespace could not be made, if the entry said so."""
    try:
        return (run / "namespace.error").read_text() or None
    except OSError:
        return None


def job_binds(
    workspace: Workspace, writable_inputs: Sequence[str], mounts: Sequence[JobMount]
) -> list[Bind]:
    """The four directories, inputs on demand and on a share, and the directories that the group lets jobs mount."""
    binds = [
        Bind(source=str(workspace.repository), target="/valohai/repository"),
        Bind(source=str(workspace.inputs), target="/valohai/inputs", readonly=True),
        Bind(source=str(workspace.outputs), target="/valohai/outputs"),
        Bind(source=str(workspace.config), target="/valohai/config", readonly=True),
    ]
    binds += [
        Bind(source=str(workspace.inputs / name), target=f"/valohai/inputs/{name}")
        for name in writable_inputs
    ]
    binds += [
        Bind(source=str(directory), target=f"/valohai/inputs/{name}", readonly=True)
        for name, directory in workspace.in_place.items()
    ]
    return binds + [
        Bind(source=mount.source, target=mount.destination, readonly=mount.readonly)
        for mount in mounts
        if mount.type in (None, "", "bind")
    ]


def not_started(reason: str) -> str:
    """What to say when the namespace could not be made although it worked when the agent started."""
    return (
        f"The command was not started, since its directories could not be put in place: {reason}. "
        "Check the step's mounts and the free space on this worker, or use a worker with Docker."
    )


def remove_root(run: Path) -> None:
    """The new root is empty outside of its namespace."""
    shutil.rmtree(run / "root", ignore_errors=True)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
