"""Starts the conductor on demand: one per deployment, found again by whoever needs it.

The conductor holds an exclusive lock on `conductor.lock` of the state directory for as long as it lives, and
writes `conductor.json` once it serves. Nobody has to start or stop anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from valohai_dagster.errors import ServiceUnavailable
from valohai_dagster.settings import Settings

log = logging.getLogger(__name__)

START_SECONDS = 30.0  # longest wait for a conductor to serve
_HELD: dict[Path, int] = {}  # keep-alive locks of this process, by file

LOCK_SECONDS = 1.0  # how long a starting conductor tries to get its lock
POLL_SECONDS = 0.05
NOTICE_SECONDS = 5.0  # longest wait for a conductor to notice that the settings file has changed
_TOLD: set[tuple[object, ...]] = set()  # what this process has said of other settings


@dataclass(frozen=True, kw_only=True)
class ConductorInfo:
    pid: int
    url: str
    on_demand: bool = True
    stamp: str = ""  # of the settings file as it was last looked at
    settings: Mapping[str, str] = field(default_factory=dict)  # in use, as digests


def lock_path(settings: Settings) -> Path:
    return settings.state_dir / "conductor.lock"


def info_path(settings: Settings) -> Path:
    return settings.state_dir / "conductor.json"


def keep_alive_path(settings: Settings) -> Path:
    return settings.state_dir / "keep-alive.lock"


def log_path(settings: Settings) -> Path:
    return settings.state_dir / "conductor.log"


@contextlib.contextmanager
def conductor_lock(settings: Settings) -> Iterator[bool]:
    """Holds the conductor's lock; yields False when another process keeps it.

    Tries for a moment, since a client that looks for the conductor holds a shared lock for an instant.
    """
    with _open(settings, lock_path(settings)) as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                yield False
                return
            time.sleep(POLL_SECONDS)
        yield True


def keep_alive(settings: Settings) -> None:
    """While this process lives, a conductor that was started on demand does not end for idleness.

    The kernel lets go of the lock with the process, however that ends.
    """
    path = keep_alive_path(settings)
    if path not in _HELD:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        _HELD[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(_HELD[path], fcntl.LOCK_SH)


def is_kept_alive(settings: Settings) -> bool:
    with _open(settings, keep_alive_path(settings)) as file:
        return not _lock(file, fcntl.LOCK_EX)


def running_conductor(settings: Settings) -> ConductorInfo | None:
    """The conductor that serves this state directory, or None."""
    with _open(settings, lock_path(settings)) as file:
        if _lock(file, fcntl.LOCK_SH):
            return None
    try:
        data = json.loads(info_path(settings).read_text())
        return ConductorInfo(**data)
    except (OSError, ValueError, TypeError):
        return None  # it is starting


def announce(settings: Settings, info: ConductorInfo) -> None:
    """Tells everybody who looks for the conductor that it serves."""
    target = info_path(settings)
    temporary = target.with_suffix(".tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(asdict(info)))
    temporary.replace(target)


def _open(settings: Settings, path: Path) -> IO[str]:
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path.open("a+")


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ensure_conductor(settings: Settings) -> ConductorInfo | None:
    """Finds the conductor or starts one; None when this deployment's conductor is started by somebody else.

    Raises `ServiceUnavailable` with what it logged when it does not come up.
    """
    if settings.redis_url is not None and not settings.start_conductor:
        return None
    if info := running_conductor(settings):
        return info
    process, before = None, _log_bytes(settings)
    what = f"did not come up within {START_SECONDS:.0f} s"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if info := running_conductor(settings):
            return info
        if process is None:
            process = spawn(settings)
        elif (
            process.poll() == 0
        ):  # another one had the lock: it starts as well, or it is about to end
            process = None
        elif process.poll() is not None:
            what = "ended as soon as it was started"
            break
        time.sleep(POLL_SECONDS)
    raise ServiceUnavailable(
        f"the conductor {what}. It said (in {log_path(settings)}):\n"
        f"{_said_since(settings, before)}\nRun `valohai-dagster doctor` to see what is wrong."
    )


def apply_settings(settings: Settings) -> None:
    """Before `ensure_conductor`: lets one that runs notice that the settings file has changed; says what still differs.

    One that was started on demand ends for the new settings by itself as soon as nothing runs.
    """
    deadline = time.monotonic() + NOTICE_SECONDS
    while (info := running_conductor(settings)) and (names := other_settings(settings, info)):
        if not _will_notice(settings, info) or time.monotonic() > deadline:
            if (info.pid, *names) not in _TOLD:
                _TOLD.add((info.pid, *names))
                log.warning("%s. %s", *other_words(info, names), extra={"action": "settings"})
            return
        time.sleep(POLL_SECONDS)


def other_settings(settings: Settings, info: ConductorInfo) -> list[str]:
    """Names of the settings that the conductor has otherwise."""
    from valohai_dagster.embedded.settings_in_use import differing  # only for those who look

    return differing(settings, info.settings) if info.settings else []


def other_words(info: ConductorInfo, names: list[str]) -> tuple[str, str]:
    """What is so, and what to do about it."""
    what = f"the conductor (pid {info.pid}) runs with other settings than these: {', '.join(names)}"
    if not info.on_demand:
        return what, "Restart it to apply them"
    return what, (
        "It takes over what the settings file says once nothing runs. To apply all of them at once, environment "
        "variables too: valohai-dagster down"
    )


def _will_notice(settings: Settings, info: ConductorInfo) -> bool:
    """Whether it looks at the same file and has not seen its present state."""
    from valohai_dagster.embedded.settings_in_use import file_stamp

    stamp = file_stamp(settings.config_file)
    same = info.stamp.rpartition("@")[0] in ("", stamp.rpartition("@")[0])
    return bool(stamp) and same and info.stamp != stamp


def spawn(settings: Settings) -> subprocess.Popen[bytes]:
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = {**os.environ, "VALOHAI_STATE": str(settings.state_dir)}
    if settings.config_file is not None:
        environment["VALOHAI_CONFIG"] = str(settings.config_file)
    command = [sys.executable, "-m", "valohai_dagster", "conductor", "--on-demand"]
    with log_path(settings).open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,  # Ctrl-C in the user's terminal is not meant for it
        )
    # Collected when it ends, also by a webserver that lives for months; a zombie looks like a conductor to `down`.
    threading.Thread(target=process.wait, name="wait-conductor", daemon=True).start()
    return process


def _log_bytes(settings: Settings) -> int:
    try:
        return log_path(settings).stat().st_size
    except OSError:
        return 0


def _said_since(settings: Settings, before: int, lines: int = 12) -> str:
    """The end of what was logged after so many bytes: not what earlier conductors said."""
    try:
        new = log_path(settings).read_bytes()[before:]
    except OSError:
        new = b""
    return "\n".join(new.decode(errors="replace").splitlines()[-lines:]) or "(nothing)"
