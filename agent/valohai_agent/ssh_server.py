"""The SSH server of one execution. Needs asyncssh, so it is imported only when asked for."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import asyncssh
from asyncssh.constants import DISC_BY_APPLICATION

from valohai_agent.errors import DebugUnavailable
from valohai_agent.protocol import RemoteDebug
from valohai_agent.runtimes.base import Running
from valohai_agent.ssh_session import DebugSession, relay

log = logging.getLogger(__name__)
logging.getLogger("asyncssh").setLevel(logging.WARNING)  # it tells of every connection at `info`

USER = "root"  # K-62
START_SECONDS = 20.0
CLOSE_SECONDS = 5.0
LOGIN_SECONDS = 30


class DebugServer:
    """Lets one public key in and ends each session, command and tunnel where the command runs.

    A thread with an event loop of its own. The host key is made anew for each execution, since nothing of it outlives it.
    """

    def __init__(self, running: Running, wanted: RemoteDebug) -> None:
        """Raises DebugUnavailable for a key that is none."""
        try:
            self._key = asyncssh.import_public_key(wanted.key)
        except (asyncssh.KeyImportError, ValueError) as error:
            raise DebugUnavailable(f"the public key cannot be read: {error}") from error
        self._running, self._port = running, wanted.port
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")
        self._connections: set[Any] = set()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._listening = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="ssh", daemon=True)

    @property
    def fingerprint(self) -> str:
        return self._host_key.get_fingerprint()

    def start(self) -> None:
        """Returns when it listens; raises DebugUnavailable when it cannot, as on a port that is taken."""
        self._thread.start()
        self._listening.wait(START_SECONDS)
        if self._error is not None or not self._listening.is_set():
            raise DebugUnavailable(
                f"port {self._port} of this worker cannot be listened on: {self._error or 'no answer'}. "
                "Choose another port"
            )

    def close(self) -> None:
        """Ends all sessions. Idempotent, never raises."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(CLOSE_SECONDS)

    # -- in the thread -----------------------------------------------------------------------------
    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except Exception as error:
            if not self._listening.is_set():
                self._error = error
            else:
                log.exception("ssh server", extra={"action": "ssh"})
        finally:
            self._listening.set()
            self._loop.close()

    async def _main(self) -> None:
        acceptor = await asyncssh.create_server(
            lambda: Door(self._running, self._key, self._connections),
            "",
            self._port,
            server_host_keys=[self._host_key],
            encoding=None,
            line_editor=False,
            login_timeout=LOGIN_SECONDS,
            keepalive_interval=30,
            allow_scp=False,
            x11_forwarding=False,
            agent_forwarding=False,
        )
        self._listening.set()
        await self._closing.wait()
        acceptor.close()
        for connection in list(self._connections):
            connection.disconnect(DISC_BY_APPLICATION, "the execution has ended")
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        """Sessions see their connection go and kill what they started; what lingers is cancelled."""
        current = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not current]
        if not others:
            return
        _, lingering = await asyncio.wait(others, timeout=CLOSE_SECONDS / 4)
        for task in lingering:
            task.cancel()
        await asyncio.gather(*lingering, return_exceptions=True)


class Door(asyncssh.SSHServer):
    """One connection: whom it lets in, and what it may open. No passwords, no listening for others."""

    def __init__(self, running: Running, key: asyncssh.SSHKey, connections: set[Any]) -> None:
        self._running, self._key, self._connections = running, key, connections
        self._connection: Any = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._connections.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self._connection)

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return username == USER and key.public_data == self._key.public_data

    def session_requested(self) -> DebugSession:
        return DebugSession(self._running)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool | Callable[[Any, Any], Awaitable[None]]:
        """A tunnel (`ssh -L`); from the container's network where that is another one."""
        if not self._running.own_network:
            return True
        return lambda reader, writer: relay(self._running, dest_host, dest_port, reader, writer)
