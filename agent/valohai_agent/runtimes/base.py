"""What a runtime offers to a job: an image, a started command, and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from valohai_agent.protocol import Job, JobMount, RegistryLogin, Usage
from valohai_agent.workspace import Workspace

SignalName = Literal["SIGINT", "SIGTERM", "SIGKILL"]
OnOutput = Callable[[str, bytes], None]
PullProgress = Callable[[str, "int | None", "int | None"], None]
"""Called with words for people, bytes done and bytes expected; at most once a second."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One command to run.

    `environment` is complete, agent switches (CONTRACT 4.3) included. `mounts` are those the group
    allows (K-58). `writable_inputs` names the on-demand inputs: user code downloads into their
    directories itself (I-36). `gpus` is "" or "all" for every GPU of the machine, "none", or
    comma-separated device ids (K-55).
    """

    workspace: Workspace
    image: str
    commands: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[JobMount] = ()
    fail_fast: bool = False
    respect_image_user: bool = False
    writable_inputs: Sequence[str] = ()
    gpus: str = ""
    project_name: str = ""
    step: str = ""


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """How the command ended. `code` is 128+n for a signal (C-29); `message` explains an unusual end in words.

    `started` is False when what prepares the command failed, so that no line of it ran.
    """

    code: int
    started: bool = True
    oom_killed: bool = False
    message: str | None = None


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A path is a link that leads to `path`, absolute as the command saw it."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A local program that runs a command where the job's command runs, with its own standard streams.

    `raw`: its terminal must pass everything on untouched, since there is another one behind it.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    raw: bool = False


class Running(Protocol):
    """A started command. All output has been delivered when `wait` gives the status."""

    @property
    def id(self) -> str:
        """Container id or process id, short enough for a status line."""
        ...

    def wait(self, timeout: float | None = None) -> ExitStatus | None:
        """The status, or None when it still runs after `timeout` seconds."""
        ...

    def signal(self, name: SignalName) -> None:
        """Signals the command's whole process group; silent when it has ended. SIGKILL ends everything."""
        ...

    def usage(self) -> Usage: ...

    @property
    def own_network(self) -> bool:
        """Whether `localhost` of the command is another one than the agent's."""
        ...

    def enter(self, argv: Sequence[str], *, terminal: str | None = None) -> Entry:
        """How to run `argv` beside the command, as root in a container (K-62).

        `terminal` is the value for TERM when the program is started with a terminal as its standard streams.
        """
        ...

    def copy_out(self, path: str, target: Path) -> Elsewhere | str | None:
        """Copies the regular file that the command left at `path`, an absolute path outside of /valohai (O-16).

        For after the end and before `remove`. None when `target` holds the content, where the path leads if it is a
        link, else why it is not copied, as the end of `... is a link to <path>, `. A file of the worker that is not
        the job's own is never copied. Raises OutputError when the content cannot be kept here.
        """
        ...

    def remove(self) -> None:
        """Kills what is left and forgets it. Idempotent, never raises."""
        ...


class Runtime(Protocol):
    """A way to run commands. Methods that talk to a daemon raise RuntimeFailure with words for people."""

    name: str
    uses_images: bool

    def available(self) -> str | None:
        """None when usable on this machine, else the reason."""
        ...

    def valohai_dir(self, workspace: Workspace) -> str:
        """Where the command sees repository/, inputs/, outputs/ and config/: `/valohai`, or the real directory."""
        ...

    def refuse(self, job: Job) -> str | None:
        """Why this runtime cannot run the job, before anything is downloaded; None if it can."""
        ...

    def pull(
        self,
        image: str,
        *,
        login: RegistryLogin | None = None,
        progress: PullProgress | None = None,
        force: bool = False,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Makes the image present; with `force` asks the registry again. Raises ImageError."""
        ...

    def notices(self, job: Job) -> list[str]:
        """Status lines this runtime owes the user (`image` not used, mounts ignored)."""
        ...

    def start(self, spec: RunSpec, on_output: OnOutput) -> Running:
        """Starts the command; `on_output(stream, bytes)` is called from reader threads. Raises StartError."""
        ...

    def api_hosts(self, environment: Mapping[str, str]) -> tuple[str, str]:
        """Where LocalApi binds, and the host the command uses to reach it."""
        ...

    def remove_leftovers(self, execution_id: str, attempt: int | None = None) -> int:
        """Kills what an earlier attempt of this execution left running on this host; gives how many.

        Without `attempt` all of them: call it before the start, for the lease is ours now.
        """
        ...

    def remove_tree(self, path: Path) -> None:
        """Removes a directory tree that user code may own as root with mode 0700."""
        ...

    def make_readable(self, path: Path) -> None:
        """Lets the agent read a tree that user code may own as root with mode 0700, before collecting outputs."""
        ...

    def clean(self) -> str:
        """Removes all images that nothing uses (VH_CLEAN); gives a line about it."""
        ...
