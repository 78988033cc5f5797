"""The agents of a machine as systemd services: under a user of their own, with little beyond what containers need.

One instance of the template runs per agent. Before each start root asks the control plane for changed credentials and a
newer agent. An agent that has drained stays down (exit code 0); one that makes way for a newer one is started again.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from valohai_agent.errors import AgentError
from valohai_agent.machine.joining import UPDATE_SECONDS
from valohai_agent.machine.places import Machine, Places

logger = logging.getLogger(__name__)

USER = "valohai-agent"
UNITS = Path("/etc/systemd/system")
SYSTEMD = Path("/run/systemd/system")  # there while systemd is process 1

_AGENT = """\
# Written by `valohai-agent join`.
[Unit]
Description=valohai-agent %i
Wants=network-online.target
After=network-online.target docker.service
StartLimitIntervalSec=0

[Service]
User={user}
{groups}EnvironmentFile={environment}
EnvironmentFile=-{config}/agent-%i.env
ExecStartPre=-+{program} refresh --config-dir {config} --work-dir {work}
ExecStart={program} run
Restart=on-failure
RestartSec=5
KillMode=mixed
TimeoutStartSec={start_seconds}
TimeoutStopSec=infinity
OOMScoreAdjust=-500
UMask=0022
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=full
ProtectHome=yes
PrivateTmp=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK

[Install]
WantedBy=multi-user.target
"""

_WATCH = """\
# Written by `valohai-agent join`.
[Unit]
Description=Keeps in touch with the control plane; a cloud machine that it has left alone powers itself off

[Service]
Type=oneshot
ExecStart={program} dead-man --config-dir {config} --work-dir {work}
"""

_TIMER = """\
# Written by `valohai-agent join`.
[Unit]
Description=Looks every minute whether the control plane of this machine is still there

[Timer]
OnBootSec=2min
OnUnitActiveSec=1min
AccuracySec=10s

[Install]
WantedBy=timers.target
"""


class CannotInstall(AgentError):
    """The services cannot be made."""


def has_systemd() -> bool:
    return SYSTEMD.is_dir()


def units(places: Places, program: Sequence[str]) -> Mapping[str, str]:
    """The unit files by name. `program` starts the agent's command line."""
    values = {
        "user": USER,
        "groups": "SupplementaryGroups=docker\n" if _group_exists("docker") else "",
        "environment": places.environment_file,
        "config": places.config,
        "work": places.work,
        "program": shlex.join(program),
        "start_seconds": round(UPDATE_SECONDS) + 60,
    }
    return {
        "valohai-agent@.service": _AGENT.format(**values),
        "valohai-watch.service": _WATCH.format(**values),
        "valohai-watch.timer": _TIMER,
    }


def install(
    places: Places, machine: Machine, program: Sequence[str], *, directory: Path = UNITS
) -> None:
    """Writes the units and starts them. Repeated, it brings them up to date. Raises CannotInstall."""
    if os.geteuid() != 0:
        raise CannotInstall(
            "Only root can make services. Run `join` as root, or with `--service none` to run the agents right here."
        )
    _make_user(places)
    for number in range(machine.answer.agents):
        own = places.environment_of(machine, number)
        text = "".join(f"{name}={value}\n" for name, value in own.items())
        (places.config / f"agent-{number}.env").write_text(text)
    made = units(places, program)
    for name, text in made.items():
        (directory / name).write_text(text)
    _run("systemctl", "daemon-reload")
    started = [f"valohai-agent@{number}.service" for number in range(machine.answer.agents)]
    started += [name for name in made if name.endswith(".timer")]
    for name in started:
        _run("systemctl", "enable", "--now", name)
    logger.info(
        "%d agents of group %s run as services",
        machine.answer.agents,
        machine.answer.group,
        extra={"action": "installed"},
    )


def _make_user(places: Places) -> None:
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        home = ("--home-dir", str(places.work), "--no-create-home")
        shell = shutil.which("nologin") or "/usr/sbin/nologin"
        _run("useradd", "--system", "--user-group", "--shell", shell, *home, USER)
        user = pwd.getpwnam(USER)
    places.work.mkdir(parents=True, exist_ok=True)
    os.chown(places.work, user.pw_uid, user.pw_gid)
    # Processes of containers pass through to what is theirs, which images' own users have to read. Nobody else finds a
    # way in: what is in here cannot be listed, and is called by random ids.
    places.work.chmod(0o711)


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotInstall(f"`{command[0]}` cannot be run: {error}.") from error
    if done.returncode:
        raise CannotInstall(
            f"`{' '.join(command)}` ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}"
        )
