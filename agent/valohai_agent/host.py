"""What this machine is: name, identity, addresses, GPUs, disk."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from valohai_agent.config_files import HostFacts
from valohai_agent.protocol import Leased
from valohai_agent.version import __version__

_MACHINE_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


@dataclass(frozen=True, kw_only=True)
class Host:
    """Facts that do not change while the agent runs; empty means unknown."""

    hostname: str = ""
    machine_id: str = ""
    local_ips: list[str] = field(default_factory=list)
    public_ip: str = ""
    gpus: list[str] = field(default_factory=list)


def observe_host() -> Host:
    """Looks once at start. Cloud bootstraps state identity and addresses through VALOHAI_AGENT_MACHINE_ID,
    VALOHAI_AGENT_LOCAL_IP and VALOHAI_AGENT_PUBLIC_IP, since this asks no metadata service."""
    return Host(
        hostname=socket.gethostname(),
        machine_id=os.environ.get("VALOHAI_AGENT_MACHINE_ID") or observe_machine_id(),
        local_ips=_local_ips(),
        public_ip=os.environ.get("VALOHAI_AGENT_PUBLIC_IP", ""),
        gpus=_gpus(),
    )


def leased_report(host: Host, runtime: str) -> Leased:
    """The first report of an attempt, which alone carries the host's facts."""
    return Leased(
        runtime=runtime,
        host=host.hostname,
        machine_id=host.machine_id,
        agent_version=__version__,
        local_ips=host.local_ips,
        gpus=host.gpus,
    )


def host_facts(host: Host, *, worker: str, runtime: str) -> HostFacts:
    """What the command gets to know about its worker (K-11, K-37)."""
    return HostFacts(
        hostname=host.hostname,
        worker=worker,
        agent_version=__version__,
        runtime=runtime,
        local_ip=host.local_ips[0] if host.local_ips else "",
        public_ip=host.public_ip,
        machine_id=host.machine_id,
    )


def disk_free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def observe_machine_id() -> str:
    """What the operating system calls this machine; empty when it does not."""
    for path in _MACHINE_ID_FILES:
        try:
            return path.read_text().strip()
        except OSError:
            continue
    return ""


def _local_ips() -> list[str]:
    """What VALOHAI_AGENT_LOCAL_IP says, for machines with several networks or no default route; else the address of
    the interface that the default route uses: a connected UDP socket sends no packet."""
    stated = os.environ.get("VALOHAI_AGENT_LOCAL_IP", "").strip()
    if stated:
        return [stated]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [probe.getsockname()[0]]
        except OSError:
            return []


def _gpus() -> list[str]:
    """Device names as the NVIDIA driver tells them; none when there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0
        else []
    )
