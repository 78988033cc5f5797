"""Private virtual environments for jobs of the process runtime, made ahead of time."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
import uuid
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from valohai_agent.errors import StartError

log = logging.getLogger(__name__)

MAKE_SECONDS = 300


class Venvs:
    """Gives each job an environment of its own. Spare ones wait, so that the start takes no time.

    An environment that its job left as it was becomes a spare one; any other is thrown away.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / f"agent-{os.getpid()}"
        self._base = directory
        self._changed = threading.Condition()
        self._spares: list[Path] = []
        self._taken: set[Path] = set()
        self._returning = 0
        self._as_made: dict[Path, int | None] = {}
        self._making = False
        self._wanted = 0
        self._template_lock = threading.Lock()

    def warm_up(self, count: int) -> None:
        """Makes more in the background until there are `count`, those that jobs have included."""
        with self._changed:
            self._wanted = count
            if self._making or not self._too_few():
                return
            self._making = True
        threading.Thread(target=self._make_spares, name="venv", daemon=True).start()

    def take(self) -> Path:
        """An environment for one job, if need be the one that is being made; raises StartError."""
        with self._changed:
            self._changed.wait_for(lambda: self._spares or not self._making)
            if self._spares:
                venv = self._spares.pop()
                self._taken.add(venv)
                return venv
        venv = self._make()
        with self._changed:
            self._taken.add(venv)
        return venv

    def give_back(self, venv: Path, *, reusable: bool = True) -> None:
        """The job is over: looks in the background whether the environment is as it was. Idempotent.

        Not `reusable` when something of the job may still be running.
        """
        with self._changed:
            if venv not in self._taken:
                return
            self._taken.remove(venv)
            self._returning += 1
        as_made = self._as_made[venv] if reusable else None
        threading.Thread(
            target=self._take_back, args=(venv, as_made), name="venv", daemon=True
        ).start()

    def _take_back(self, venv: Path, as_made: int | None) -> None:
        good = as_made is not None and as_made == _state(venv)
        with self._changed:
            self._returning -= 1
            if good:
                self._spares.append(venv)
                self._changed.notify_all()
        if not good:
            del self._as_made[venv]
            self.warm_up(self._wanted)
            shutil.rmtree(venv, ignore_errors=True)

    def _make_spares(self) -> None:
        try:
            while self._too_few():
                venv = self._make()
                with self._changed:
                    self._spares.append(venv)
                    self._changed.notify_all()
        except StartError as error:
            log.warning("%s", error, extra={"action": "venv"})
        finally:
            with self._changed:
                self._making = False
                self._changed.notify_all()

    def _too_few(self) -> bool:
        return len(self._spares) + len(self._taken) + self._returning < self._wanted

    def _make(self) -> Path:
        """A copy of one that is never used, which takes a fraction of the time. Raises StartError."""
        with self._template_lock:
            self._remove_dead()
            template = self._template()
        path = self._directory / uuid.uuid4().hex[:12]
        _run(["cp", "-RPp", str(template), str(path)])
        for file in (path / "pyvenv.cfg", *(path / "bin").iterdir()):
            if not file.is_symlink():
                _replace(file, os.fsencode(template), os.fsencode(path))
        self._as_made[path] = _state(path)
        return path

    def _template(self) -> Path:
        """What an earlier agent left, or made now.

        A link names it once it is finished, so that no half of one is ever copied.
        """
        link = self._base / f"template-{_made_of()}"
        with (self._base / "template.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several agents that start here, one makes it
            if not (link / "bin").is_dir():
                self._make_template(link)
        return Path(os.readlink(link))

    def _make_template(self, link: Path) -> None:
        """In a process of its own: here it would take the time of the threads that follow running jobs."""
        path = link.with_name(f"{link.name}-{uuid.uuid4().hex[:6]}")
        virtualenv = [sys.executable, "-m", "virtualenv", "--quiet"]
        _run([*virtualenv, "--no-periodic-update", "--no-download", str(path)])
        _run([str(path / "bin" / "python"), "-c", ""])  # writes what every start would write
        finished = self._directory / path.name
        finished.symlink_to(path)
        finished.replace(link)

    def _remove_dead(self) -> None:
        """Environments of agents that are gone."""
        if self._directory.exists():
            return
        self._directory.mkdir(parents=True)
        for other in self._base.glob("agent-*"):
            pid = other.name.rpartition("-")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(other, ignore_errors=True)


def _made_of() -> str:
    """Stands for everything that environments of this agent are made of."""
    try:
        tool = metadata.version("virtualenv")
    except metadata.PackageNotFoundError as error:
        raise StartError(
            "The private virtual environment cannot be made: the Python package `virtualenv` is not installed"
        ) from error
    return sha256(f"{sys.executable} {sys.version} {tool}".encode()).hexdigest()[:12]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MAKE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartError(f"The private virtual environment cannot be made: {error}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise StartError(
            f"The private virtual environment cannot be made: {words or f'exit code {done.returncode}'}"
        )


def _replace(file: Path, old: bytes, new: bytes) -> None:
    """Scripts and pyvenv.cfg name their environment; nothing else in it does."""
    try:
        content = file.read_bytes()
        if old in content:
            file.write_bytes(content.replace(old, new))
    except OSError as error:
        raise StartError(f"The private virtual environment cannot be made: {error}") from error


def _state(venv: Path) -> int | None:
    """Changes with every change below `venv`, since the kernel keeps the times; None when it cannot be read."""
    found: list[tuple[str, int]] = []
    directories = [str(venv)]
    try:
        while directories:
            directory = directories.pop()
            found.append((directory, os.lstat(directory).st_ctime_ns))
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    else:
                        changed = entry.stat(follow_symlinks=False).st_ctime_ns
                        found.append((entry.path, changed))
    except OSError:
        return None
    return hash(tuple(sorted(found)))
