"""Runs commands as plain processes, for machines without a container engine."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

from valohai_agent.errors import StartError
from valohai_agent.processes import kill_attempt
from valohai_agent.protocol import Job, RegistryLogin
from valohai_agent.runtimes import namespace
from valohai_agent.runtimes.base import OnOutput, PullProgress, RunSpec
from valohai_agent.runtimes.entries import Entries
from valohai_agent.runtimes.mount_checks import first_problem
from valohai_agent.runtimes.process_running import ProcessRunning
from valohai_agent.runtimes.script import build_script, names_valohai
from valohai_agent.runtimes.venvs import Venvs
from valohai_agent.trees import open_tree, remove_tree
from valohai_agent.workspace import Workspace

ALLOWED = frozenset(
    [
        "HOME",
        "LANG",
        "LANGUAGE",
        "LOGNAME",
        "SHELL",
        "TMPDIR",
        "TZ",
        "USER",
        "PATH",
        "LD_LIBRARY_PATH",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "all_proxy",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_VISIBLE_DEVICES",
    ]
)
NO_IMAGE = (
    "The image {image} is not used: this worker runs commands as plain processes, "
    "with a private virtual environment first on PATH."
)
ALLOWED_PREFIXES = ("LC_", "PIP_", "UV_", "NVIDIA_", "OMP_")
LEAVE_ALONE_SECONDS = 1.0  # a command that starts has the machine for itself
CONTAINER_ONLY = (
    "VH_CPU_LIMIT",
    "VH_MEMORY_LIMIT",
    "VH_SHM_SIZE",
    "VH_EXPOSE_PORTS",
    "VH_DOCKER_NETWORK",
)


class ProcessRuntime:
    """A session of processes with private directories and a private virtual environment first on PATH.

    `/valohai` is bound by a mount namespace where the machine allows it. Where not, VH_* variables point
    to the real directories, and a job that names `/valohai/` is refused. The image is never used.
    """

    name = "process"
    uses_images = False

    def __init__(
        self, work_dir: Path, *, slots: int = 1, without_namespace: str | None = None
    ) -> None:
        """`without_namespace` is a reason to do without, for tests."""
        self._slots = slots
        self._venvs = Venvs(work_dir / "venvs")
        self._entries = Entries()
        self._no_namespace = without_namespace or namespace.available()

    def available(self) -> str | None:
        if os.name != "posix":
            return "the process runtime needs Linux or macOS"
        self._warm_up(self._slots)
        return None

    def valohai_dir(self, workspace: Workspace) -> str:
        return "/valohai" if self._no_namespace is None else str(workspace.root)

    def refuse(self, job: Job) -> str | None:
        if self._no_namespace is None:
            return first_problem(job.mounts) if job.mounts_allowed else None
        item = names_valohai(job.commands)
        if item is None:
            return None
        return (
            f"This worker cannot provide the path /valohai that the command names ({item!r}): "
            f"{self._no_namespace}. Use $VH_INPUTS_DIR, $VH_OUTPUTS_DIR, $VH_REPOSITORY_DIR and "
            "$VH_CONFIG_DIR in the command, or run it on a worker with Docker."
        )

    def notices(self, job: Job) -> list[str]:
        notices = [NO_IMAGE.format(image=job.image)]
        if self._no_namespace is not None:
            notices.append(f"/valohai is not bound: {self._no_namespace}.")
        if job.mounts and not job.mounts_allowed:
            notices.append("mounts were ignored due to environment configuration.")
        elif job.mounts and self._no_namespace is not None:
            notices.append("mounts were ignored: this worker cannot bind directories.")
        unused = [name for name in CONTAINER_ONLY if name in job.environment_variables]
        if unused:
            notices.append(f"{', '.join(unused)} have no effect on plain processes.")
        return notices

    def pull(
        self,
        image: str,
        *,
        login: RegistryLogin | None = None,
        progress: PullProgress | None = None,
        force: bool = False,
        cancelled: threading.Event | None = None,
    ) -> None:
        """No image is used."""

    def start(self, spec: RunSpec, on_output: OnOutput) -> ProcessRunning:
        workspace = spec.workspace
        script = build_script(spec.commands, fail_fast=spec.fail_fast)
        path = workspace.run / "command"
        path.write_text(script.text, encoding="utf-8", errors="surrogateescape")
        path.chmod(0o755)
        (workspace.run / "namespace.error").unlink(missing_ok=True)
        venv = self._venvs.take()
        environment = self._environment(spec.environment, venv)
        try:
            process = self._popen(spec, script.argv(str(path)), environment)
        except (OSError, ValueError) as error:
            self._venvs.give_back(venv)
            raise StartError(f"The command cannot be started: {error}.") from error
        running = ProcessRunning(
            process,
            workspace,
            on_output,
            lambda ended: self._venvs.give_back(venv, reusable=ended),
            venv=venv,
            gpus=spec.gpus,
            environment=environment,
            namespaced=self._no_namespace is None,
        )
        running.start()
        self._warm_up_later()
        return running

    def _popen(
        self, spec: RunSpec, argv: list[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        workspace = spec.workspace
        if self._no_namespace is None:
            binds = namespace.job_binds(workspace, spec.writable_inputs, spec.mounts)
            cwd = "/valohai/repository"
            return self._entries.start(
                namespace.entry_spec(workspace.run, binds, argv, cwd=cwd, environment=environment)
            )
        return subprocess.Popen(
            argv,
            cwd=workspace.repository,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def _warm_up_later(self) -> None:
        timer = threading.Timer(LEAVE_ALONE_SECONDS, self._warm_up, args=(self._slots + 1,))
        timer.daemon = True
        timer.start()

    def _warm_up(self, environments: int) -> None:
        """Makes what the next job would wait for."""
        self._venvs.warm_up(environments)
        if self._no_namespace is None:
            self._entries.warm_up()

    def api_hosts(self, environment: Mapping[str, str]) -> tuple[str, str]:
        return "127.0.0.1", "127.0.0.1"

    def remove_leftovers(self, execution_id: str, attempt: int | None = None) -> int:
        return kill_attempt(execution_id, attempt)

    def remove_tree(self, path: Path) -> None:
        remove_tree(path)

    def make_readable(self, path: Path) -> None:
        open_tree(path)

    def clean(self) -> str:
        return "no images are used on this worker"

    def _environment(self, given: Mapping[str, str], venv: Path) -> dict[str, str]:
        """An allow-list of the agent's own variables, below those of the job."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if key in ALLOWED or key.startswith(ALLOWED_PREFIXES)
        }
        environment.update(given)
        path = environment.get("PATH") or os.defpath
        environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{path}"
        environment["VIRTUAL_ENV"] = str(venv)
        return environment
