"""The private directory tree of one attempt, and the removal of what dead agents left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Workspace:
    """`work_dir/<execution>/<attempt>/` with the directories of CONTRACT 4.1, locked by the agent that owns it.

    `repository`, `inputs`, `outputs` and `config` become `/valohai/...`; `run` holds the script, spools and notes
    for reaping; `logs` holds the plain growing files `stdout`, `stderr` and `events`, which outlive a lost attempt
    so that they can be salvaged. The lock is an flock: it goes with the process, however that ends.
    """

    root: Path
    execution_id: str
    attempt: int
    worker: str

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

    @classmethod
    def create(cls, work_dir: Path, execution_id: str, attempt: int, worker: str) -> Workspace:
        """Makes the tree empty and takes the lock; raises WorkspaceError when a living agent holds it."""
        raise NotImplementedError

    def remove(self, *, remove_tree: Callable[[Path], None] | None = None, keep_logs: bool = False) -> None:
        """Removes the tree, root-owned 0700 directories included, and lets go of the lock. Never raises:
        what could not be removed is logged and left to `reap_leftovers`. `remove_tree` is `Runtime.remove_tree`."""
        raise NotImplementedError


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
    remove_containers: Callable[[str], int] | None = None,
    remove_tree: Callable[[Path], None] | None = None,
    keep_logs_seconds: float = 7 * 86400,
) -> list[Leftover]:
    """Ends sessions and containers of attempts whose agent died, and removes their directories but `logs`.

    Safe to call at any time and by several agents at once: attempts with a living owner are not touched.
    `remove_containers(execution_id)` is `Runtime.remove_leftovers`, `remove_tree` is `Runtime.remove_tree`.
    """
    raise NotImplementedError
