"""A started container: its output, its end, its signals."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valohai_agent.protocol import Usage
from valohai_agent.runtimes.base import Elsewhere, Entry, ExitStatus, OnOutput, SignalName
from valohai_agent.runtimes.docker_files import copy_out
from valohai_agent.runtimes.exits import explain
from valohai_agent.usage import Sample, UsageMeter

if TYPE_CHECKING:
    from docker import DockerClient

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2
DAEMON_LOST_SECONDS = 300.0  # the daemon may be restarted under a running container


class DockerRunning:
    """Follows one container with a thread that reads its output and then waits for its end."""

    def __init__(
        self,
        client: DockerClient,
        container: Any,
        on_output: OnOutput,
        memory_limit: int | None,
        *,
        signal_group: bool,
        gpus: str = "",
    ) -> None:
        self._client = client
        self._container = container
        self._on_output = on_output
        self._memory_limit = memory_limit
        self._signal_group = signal_group
        self._signalled = False
        self._status: ExitStatus | None = None
        self._ended = threading.Event()
        self._meter = UsageMeter(self._sample, gpus=gpus)

    @property
    def id(self) -> str:
        return self._container.id[:12]

    def start(self) -> None:
        """Attaches first, so that not a byte is missed, then starts the container."""
        stream = self._attach()
        try:
            self._container.start()
        except Exception:
            _close(stream)
            raise
        threading.Thread(target=self._follow, args=(stream,), name="output", daemon=True).start()
        self._meter.start()

    def wait(self, timeout: float | None = None) -> ExitStatus | None:
        return self._status if self._ended.wait(timeout) else None

    def signal(self, name: SignalName) -> None:
        """Signals the process group of the command: Docker's init passes it on to all of it."""
        from docker.errors import APIError

        self._signalled = True
        try:
            if name == "SIGKILL" or self._signal_group:
                self._container.kill(signal=name)
            else:  # an init that passes signals to its child only
                kill = ["/bin/sh", "-c", f"kill -s {name.removeprefix('SIG')} -- -1"]
                self._container.exec_run(kill, user="0:0")
        except APIError as error:
            gone = error.status_code in (404, 409) or "state improper" in str(error)  # Podman: 500
            if not gone:
                raise

    def usage(self) -> Usage:
        killed = self._status.oom_killed if self._status else False
        return self._meter.usage().model_copy(update={"oom_killed": killed})

    @property
    def own_network(self) -> bool:
        return True

    def enter(self, argv: Sequence[str], *, terminal: str | None = None) -> Entry:
        module = [sys.executable, "-m", "valohai_agent.runtimes.docker_exec", self._container.id]
        kind = ["plain", "-"] if terminal is None else ["tty", terminal]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VALOHAI_")}
        return Entry(argv=[*module, *kind, *argv], environment=environment, raw=True)

    def copy_out(self, path: str, target: Path) -> Elsewhere | str | None:
        return copy_out(self._client.api, self._container.id, path, target)

    def remove(self) -> None:
        from docker.errors import NotFound

        try:
            self._container.remove(force=True, v=True)
        except NotFound:
            pass
        except Exception as error:  # noqa: BLE001 - never stops the end of a job; reaping tries again
            log.warning("container %s: %s", self.id, error, extra={"action": "remove"})

    # -- threads -----------------------------------------------------------------------------------
    def _attach(self) -> Any:
        """A socket of our own: the SDK's generator would leave closing it to the garbage collector."""
        wanted = {"stdout": 1, "stderr": 1, "stream": 1}
        return self._client.api.attach_socket(self._container.id, params=wanted)

    def _follow(self, stream: Any) -> None:
        try:
            self._read(stream)
            state = self._final_state()
            self._status = explain(
                int(state.get("ExitCode", 255)),
                oom=bool(state.get("OOMKilled")),
                limit=self._memory_limit,
                signalled=self._signalled,
            )
        except Exception as error:
            log.exception("container %s", self.id, extra={"action": "follow"})
            self._status = ExitStatus(
                code=255, message=f"The Docker daemon lost the container: {error}"
            )
        finally:
            self._meter.stop()
            self._ended.set()

    def _read(self, stream: Any) -> None:
        from docker.utils.socket import STDERR, frames_iter

        try:
            for kind, data in frames_iter(stream, tty=False):
                self._on_output("stderr" if kind == STDERR else "stdout", data)
        except OSError as error:
            log.warning("output of %s broke off: %s", self.id, error, extra={"action": "attach"})
        finally:
            _close(stream)

    def _final_state(self) -> dict[str, Any]:
        """Waits until the container has ended; attaches again if only the connection had broken.

        Output ends a moment before the container does. To attach in that moment makes Podman hang or report an error
        on stderr, so the end is waited for first.
        """
        from docker.errors import NotFound

        lost_since: float | None = None
        while True:
            try:
                self._settle()
                state = self._client.api.inspect_container(self._container.id)["State"]
                lost_since = None
                if state["Status"] in ("exited", "dead", "removing"):
                    return state
                if state.get("Running"):
                    self._read(self._attach())
            except NotFound:
                return {"ExitCode": 137}
            except Exception as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > DAEMON_LOST_SECONDS:
                    raise
                log.warning("docker: %s", error, extra={"action": "inspect"})
            self._ended.wait(0.1 if lost_since is None else 2.0)

    def _settle(self) -> None:
        """Waits a little for the container's end, if it is near."""
        from requests import exceptions

        with contextlib.suppress(exceptions.ConnectionError, exceptions.ReadTimeout):  # it runs on
            self._client.api.wait(self._container.id, timeout=SETTLE_SECONDS)

    def _sample(self) -> Sample:
        return sample_of(self._client.api.stats(self._container.id, stream=False, one_shot=True))


def sample_of(stats: Mapping[str, Any]) -> Sample:
    """Memory without the page cache that the kernel gives back at need, as Docker's own tool shows it."""
    memory = stats.get("memory_stats") or {}
    details = memory.get("stats") or {}
    cache = details.get("inactive_file") or details.get("total_inactive_file") or 0
    total = ((stats.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage")
    return Sample(
        cpu_seconds=total / 10**9 if total else None,
        memory_bytes=max(0, memory["usage"] - cache) if memory.get("usage") else None,
    )


def _close(stream: Any) -> None:
    """Closes the attached socket, and the response that owns its connection."""
    response = getattr(stream, "_response", None)
    with contextlib.suppress(OSError, ValueError):  # whichever closes first closes the file of both
        if response is not None:
            response.close()
    with contextlib.suppress(OSError, ValueError):
        stream.close()
