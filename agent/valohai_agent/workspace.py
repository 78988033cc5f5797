"""The private directory tree of one attempt, and the removal of what dead agents left behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from valohai_agent.beneath import Place
from valohai_agent.errors import WorkspaceError
from valohai_agent.processes import kill_attempt
from valohai_agent.trees import remove_tree as remove_own_tree

log = logging.getLogger(__name__)

DIRECTORIES = ("repository", "inputs", "outputs", "config", "run", "logs")
RemoveTree = Callable[[Path], None]


class Workspace:
    """`work_dir/<execution>/<attempt>/` with the directories of CONTRACT 4.1, locked by its agent.

    `repository`, `inputs`, `outputs` and `config` become `/valohai/...`; `run` holds the script,
    spools and notes for reaping; `logs` holds the plain growing files `stdout`, `stderr` and
    `events`, which outlive a lost attempt so that they can be salvaged. The lock is an flock: it
    goes with the process, however that ends.
    """

    def __init__(
        self, root: Path, execution_id: str, attempt: int, worker: str, lock_fd: int
    ) -> None:
        self.root = root
        self.execution_id = execution_id
        self.attempt = attempt
        self.worker = worker
        self.in_place: dict[str, Path] = {}  # inputs that lie on a share, by their directory
        self._lock_fd = lock_fd

    @property
    def repository(self) -> Path:
        return self.root / "repository"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def locate(self, *parts: str) -> Place:
        """Where a path below `/valohai` is on disk."""
        for name, directory in self.in_place.items():
            own = ["inputs", *name.split("/")]
            if list(parts[: len(own)]) == own:
                return Place(root=directory, relative="/".join(parts[len(own) :]))
        return Place(root=self.root, relative="/".join(parts))

    @classmethod
    def create(cls, work_dir: Path, execution_id: str, attempt: int, worker: str) -> Workspace:
        """Makes the tree empty and takes its lock.

        Raises WorkspaceError when a living agent holds it, or when the directory cannot be made.
        """
        root = work_dir / execution_id / str(attempt)
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock_fd = _lock(root)
        except OSError as error:
            raise WorkspaceError(
                f"The work directory {root} cannot be made: {error.strerror or error}. "
                "Give the agent another one with --work-dir, or free space on this disk."
            ) from error
        if lock_fd is None:
            raise WorkspaceError(
                f"The work directory {root} belongs to a running agent ({_owner(root)}). "
                "Two agents took one attempt; stop one of them."
            )
        try:
            _make_directories(root, execution_id, attempt, worker)
        except OSError as error:
            os.close(lock_fd)
            raise WorkspaceError(f"The work directory {root} cannot be filled: {error}") from error
        return cls(root, execution_id, attempt, worker, lock_fd)

    def remove(self, *, remove_tree: RemoveTree | None = None, keep_logs: bool = False) -> None:
        """Removes the tree, root-owned 0700 directories included, and lets go of the lock.

        Never raises: what could not be removed is logged and left to `reap_leftovers`.
        `remove_tree` is `Runtime.remove_tree`.
        """
        _remove_attempt(self.root, remove_tree or remove_own_tree, keep_logs=keep_logs)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One attempt of a dead agent that was cleaned up; its `logs` directory is still there."""

    execution_id: str
    attempt: int
    worker: str
    logs: Path


def reap_leftovers(
    work_dir: Path,
    *,
    remove_containers: Callable[[str, int], int] | None = None,
    remove_tree: RemoveTree | None = None,
    keep_logs_seconds: float = 7 * 86400,
    now: Callable[[], float] = time.time,
) -> list[Leftover]:
    """Ends processes and containers of attempts whose agent died; removes all but their `logs`.

    Safe to call at any time and by several agents at once: attempts with a living owner are not
    touched. `remove_containers(execution_id, attempt)` is `Runtime.remove_leftovers`, `remove_tree`
    is `Runtime.remove_tree`. Logs that nobody salvaged go after `keep_logs_seconds`.
    """
    found = []
    for root in _attempts(work_dir):
        with _locked(root) as owned:
            if not owned:
                continue
            leftover = _reap(root, remove_containers, remove_tree or remove_own_tree)
            if leftover is not None:
                found.append(leftover)
            _expire_logs(root, keep_logs_seconds, now())
    return found


def _reap(
    root: Path, remove_containers: Callable[[str, int], int] | None, remove_tree: RemoveTree
) -> Leftover | None:
    notes = _notes(root)
    if notes is None or not any((root / name).exists() for name in DIRECTORIES if name != "logs"):
        return None
    kill_attempt(notes["execution_id"], notes["attempt"])
    if remove_containers is not None:
        remove_containers(notes["execution_id"], notes["attempt"])
    _remove_attempt(root, remove_tree, keep_logs=True)
    log.info("reaped what a dead agent left", extra={"action": "reap", **notes})
    return Leftover(**notes, logs=root / "logs")


def _make_directories(root: Path, execution_id: str, attempt: int, worker: str) -> None:
    for name in DIRECTORIES:
        if (root / name).exists():
            remove_own_tree(root / name)
        (root / name).mkdir()
    notes = {"execution_id": execution_id, "attempt": attempt, "worker": worker}
    (root / "owner.json").write_text(json.dumps(notes))
    for name in ("repository", "outputs"):
        (root / name).chmod(0o777 if os.geteuid() != 0 else 0o755)


def _lock(root: Path) -> int | None:
    """An flock on the attempt, or None while another process holds it."""
    fd = os.open(root / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[bool]:
    try:
        fd = _lock(root)
    except OSError:
        yield False
        return
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def _owner(root: Path) -> str:
    notes = _notes(root)
    return notes["worker"] if notes else "unknown"


def _notes(root: Path) -> dict | None:
    try:
        notes = json.loads((root / "owner.json").read_text())
        return {key: notes[key] for key in ("execution_id", "attempt", "worker")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _attempts(work_dir: Path) -> list[Path]:
    return [lock.parent for lock in sorted(work_dir.glob("*/*/owner.lock"))]


def _remove_attempt(root: Path, remove_tree: RemoveTree, *, keep_logs: bool) -> None:
    for name in DIRECTORIES:
        if name == "logs" and keep_logs:
            continue
        try:
            if (root / name).exists():
                remove_tree(root / name)
        except Exception as error:  # noqa: BLE001 - the outermost frame of clean-up: the next reaping tries again
            log.warning(
                "cannot remove %s: %s", root / name, error, extra={"action": "workspace-remove"}
            )
    if any((root / name).exists() for name in DIRECTORIES):
        return
    with contextlib.suppress(OSError):
        shutil.rmtree(root)
        root.parent.rmdir()  # fails, as it should, while other attempts are there


def _expire_logs(root: Path, keep_seconds: float, now: float) -> None:
    logs = root / "logs"
    try:
        newest = max((entry.stat().st_mtime for entry in (logs, *logs.iterdir())), default=0.0)
    except OSError:
        return
    if now - newest > keep_seconds and not (root / "run").exists():
        with contextlib.suppress(OSError):
            shutil.rmtree(root)
            root.parent.rmdir()
