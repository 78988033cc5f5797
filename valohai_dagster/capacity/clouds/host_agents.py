"""Agent processes on this host: how they are called, what they inherit, and whether they live.

Each holds a file lock that it inherits, for as long as it lives: its death can be told for sure, also by a service that
is not its parent, and no reused process id is ever mistaken for an agent.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from valohai_dagster.settings_groups import AnyGroupSettings

# What an agent process has no business with: our own settings and the host's cloud credentials.
_WITHHELD = ("VALOHAI_", "DAGSTER_", "AWS_", "AZURE_", "GOOGLE_")


def command(
    group: str, settings: AnyGroupSettings, *, deployment: str, name: str, work_dir: Path
) -> list[str]:
    return [
        *(sys.executable, "-m", "valohai_agent", "run"),
        *("--queue", group, "--deployment", deployment, "--name", name),
        *("--slots", str(settings.slots), "--runtime", settings.runtime),
        *("--work-dir", str(work_dir)),
        *_cache_options(settings),
    ]


def _cache_options(group: AnyGroupSettings) -> list[str]:
    options = ["--cache-disk-percent", str(group.cache_disk_percent)]
    if group.cache_max_gb is not None:
        options += ["--cache-max-gb", str(group.cache_max_gb)]
    if group.shared_cache is not None:
        options += ["--shared-cache", str(group.shared_cache)]
        options += ["--shared-cache-copy"] if group.shared_cache_copy else []
    return options


def environment(
    settings: AnyGroupSettings, *, redis_url: str, log_format: str = "text", machine_id: str = ""
) -> dict[str, str]:
    ours = {"VALOHAI_AGENT_REDIS": redis_url, "VALOHAI_AGENT_LOG_FORMAT": log_format}
    if machine_id:
        ours["VALOHAI_AGENT_MACHINE_ID"] = machine_id
    return {**inherited(), **ours, **settings.env}


def inherited() -> dict[str, str]:
    """Of this process's environment what agents may have."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_WITHHELD)}


def start(
    arguments: Sequence[str], env: Mapping[str, str], *, lock: Path, log: Path
) -> subprocess.Popen[bytes]:
    """In a session of its own, so that it outlives us."""
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with log.open("ab") as out:
            return subprocess.Popen(
                arguments,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=(held,),
            )
    finally:
        os.close(held)


def lock_held(lock: Path) -> bool | None:
    """Whether the agent's process lives; None when there is no such lock."""
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return None
    return False
