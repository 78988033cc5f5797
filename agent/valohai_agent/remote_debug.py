"""SSH into a running execution (K-60 to K-62): when it is asked for, said, and ended."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from valohai_agent.errors import DebugUnavailable
from valohai_agent.host import Host
from valohai_agent.protocol import RemoteDebug
from valohai_agent.runtimes.base import Running

if TYPE_CHECKING:
    from valohai_agent.ssh_server import DebugServer

log = logging.getLogger(__name__)

EXTRA_MISSING = (
    "the Python package `asyncssh` is not installed on this worker. Install the extra `ssh` there: "
    "pip install 'valohai-agent[ssh]'"
)


@contextlib.contextmanager
def remote_debug(
    wanted: RemoteDebug | None,
    running: Running,
    *,
    host: Host,
    status: Callable[[str], None],
    warn: Callable[[str], None],
) -> Iterator[None]:
    """Serves SSH within the block. What stands in the way is a warning: the command runs whatever becomes of it."""
    server = None
    if wanted is not None:
        try:
            server = _started(wanted, running)
            _announce(wanted.port, server.fingerprint, host, status)
        except DebugUnavailable as error:
            warn(f"Remote debugging is not available: {error}.")
    try:
        yield
    finally:
        if server is not None:
            server.close()


def _started(wanted: RemoteDebug, running: Running) -> DebugServer:
    try:
        from valohai_agent.ssh_server import DebugServer
    except ImportError as error:
        raise DebugUnavailable(EXTRA_MISSING) from error
    server = DebugServer(running, wanted)
    server.start()
    return server


def _announce(port: int, fingerprint: str, host: Host, status: Callable[[str], None]) -> None:
    """K-61: first the event that programs look for, then the line for people."""
    address = host.public_ip or next(iter(host.local_ips), "") or host.hostname
    status("::ssh::" + json.dumps({"port": port, "address": address}))
    status(
        f"SSH is open while the command runs: ssh -i <your private key> -p {port} root@{address} "
        f"(host key {fingerprint})"
    )
