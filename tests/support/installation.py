"""A whole installation on this machine for load and recovery: Postgres, Redis, conductors, and a Dagster instance.

Everything lies in one directory. Conductors are real processes, each with a state directory of its own; code, stores
and keys are shared, as in a deployment of several hosts.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.ports import wait_for
from tests.support.postgres_server import PostgresServer
from tests.support.redis_server import RedisServer

START_SECONDS = 90.0
STOP_SECONDS = 20.0
CONDUCTOR = ("valohai_dagster", "conductor")

DAGSTER_YAML = """\
storage:
  postgres:
    postgres_url: {postgres}
run_launcher:
  module: valohai_dagster.plugin.launcher
  class: ValohaiRunLauncher
run_coordinator:
  module: dagster.core.run_coordinator
  class: DefaultRunCoordinator
compute_logs:
  module: valohai_dagster.plugin.compute_logs
  class: ValohaiComputeLogManager
telemetry: {{enabled: false}}
"""
VALOHAI_TOML = """\
redis_url = {redis}
database_url = {postgres}
http_port = 0
{settings}
[stores.local]
path = {store}
[groups.local]
kind = "static"
"""


class Conductor:
    """One conductor process, started and killed as often as a test likes."""

    def __init__(self, state: Path, environment: Mapping[str, str]) -> None:
        self.state = state
        self._environment = {**environment, "VALOHAI_STATE": str(state)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        *,
        wait: bool = True,
        module: Sequence[str] = CONDUCTOR,
        environment: Mapping[str, str] | None = None,
    ) -> Conductor:
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "conductor.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *module],
                env={**os.environ, **self._environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if wait:
            wait_for(self.serves, seconds=START_SECONDS, every=0.1, what="the conductor")
        return self

    def serves(self) -> bool:
        assert self.alive, f"the conductor ended:\n{self.log()}"
        try:
            info = json.loads((self.state / "conductor.json").read_text())
        except (OSError, ValueError):
            return False
        return info["pid"] == self.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def killed(self) -> bool:
        """Ended by SIGKILL, its own or ours."""
        return self._process is not None and self._process.poll() == -signal.SIGKILL

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        path = self.state / "conductor.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""


class Installation:
    """Use as a context manager; everything that was started ends with it."""

    def __init__(
        self,
        root: Path,
        *,
        project: str,
        durable: bool = False,
        postgres_options: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.root = root
        self.postgres = PostgresServer(options=postgres_options, durable=durable)
        self.redis = RedisServer(root / "redis", append_only=True)
        self.conductors: list[Conductor] = []
        self._project, self._settings = project, dict(settings or {})

    def __enter__(self) -> Installation:
        try:
            self.redis.start()
            self.postgres.start()
            self._lay_out()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for conductor in self.conductors:
            conductor.kill()
        self.redis.stop()
        self.postgres.stop()

    def _lay_out(self) -> None:
        """DAGSTER_HOME, the project and the settings file; the Dagster storage in a database of its own."""
        url = self.postgres.fresh_database()
        settings = "\n".join(f"{k} = {json.dumps(v)}" for k, v in self._settings.items())
        files = {
            "home/dagster.yaml": DAGSTER_YAML.format(postgres=json.dumps(url)),
            "project/valohai.yaml": textwrap.dedent(self._project),
            "valohai.toml": VALOHAI_TOML.format(
                redis=json.dumps(self.redis.unix_url),
                postgres=json.dumps(url),
                store=json.dumps(str(self.root / "store")),
                settings=settings,
            ),
        }
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.postgres_url = url

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of the installation."""
        return {
            "VALOHAI_CONFIG": str(self.root / "valohai.toml"),
            "VALOHAI_STATE": str(self.root / "state"),
            "VALOHAI_SECRET_KEY": base64.b64encode(b"k" * 32).decode(),
            "DAGSTER_HOME": str(self.root / "home"),
            "DAGSTER_DISABLE_TELEMETRY": "yes",
        }

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This process counts as one of the installation's for as long."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def add_conductor(self, *, start: bool = True) -> Conductor:
        state = self.root / f"conductor-{len(self.conductors)}"
        conductor = Conductor(state, self.environment)
        self.conductors.append(conductor)
        return conductor.start() if start else conductor
