"""What this machine is: name, identity, addresses, GPUs, disk."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

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
    """Looks once at start. Cloud bootstraps state identity and address through VALOHAI_AGENT_MACHINE_ID and
    VALOHAI_AGENT_PUBLIC_IP, since the agent talks to no metadata service."""
    return Host(
        hostname=socket.gethostname(),
        machine_id=os.environ.get("VALOHAI_AGENT_MACHINE_ID") or _machine_id(),
        local_ips=_local_ips(),
        public_ip=os.environ.get("VALOHAI_AGENT_PUBLIC_IP", ""),
        gpus=_gpus(),
    )


def disk_free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _machine_id() -> str:
    for path in _MACHINE_ID_FILES:
        try:
            return path.read_text().strip()
        except OSError:
            continue
    return ""


def _local_ips() -> list[str]:
    """The address of the interface that the default route uses; a connected UDP socket sends no packet."""
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
