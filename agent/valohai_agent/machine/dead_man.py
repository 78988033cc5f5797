"""The dead man's switch: a machine that nobody speaks to any more, and that has nothing to do, powers itself off.

The last word from the control plane is the later of: the boot, the last answer to a refresh, and the last moment at
which a job ran here. Before the switch falls it asks once more, so a wrong clock alone powers nothing off.

A machine without the switch, or one that is always busy, asks once a day, so that its ticket does not expire.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from valohai_agent.errors import AgentError
from valohai_agent.machine.joining import refresh
from valohai_agent.machine.places import Machine, Places
from valohai_agent.machine.program import BUSY_MARK

logger = logging.getLogger(__name__)

ASK_SHARE = 4  # asks after this part of the time without a word
RENEW_SECONDS = 86_400.0
POWER_OFF = ("systemctl", "poweroff", "--no-block")


def quiet_seconds(places: Places, *, now: float, booted_at: float) -> float:
    """How long the control plane has not been heard of. Times are seconds since the epoch."""
    marks = (places.word_mark, places.work / BUSY_MARK)
    return max(0.0, now - max(booted_at, *(_touched(mark) for mark in marks)))


def look(places: Places, *, hostname: str, now: float | None = None) -> bool:
    """One look; True when the machine is to be powered off. Raises NotJoined."""
    machine = places.load()
    limit = machine.answer.dead_man_seconds
    moment = time.time() if now is None else now
    quiet = quiet_seconds(places, now=moment, booted_at=_booted_at(places))
    if limit is None or quiet < limit / ASK_SHARE:
        if moment - max(_touched(places.word_mark), _touched(places.asked_mark)) >= RENEW_SECONDS:
            places.asked_mark.touch()
            _word_comes(places, machine, hostname)
        return False
    if _word_comes(places, machine, hostname):
        return False
    if quiet < limit:
        return False
    logger.error(
        "no word from the control plane for %d s and nothing to do; powering off",
        quiet,
        extra={"action": "dead-man"},
    )
    return True


def power_off(run: Callable[..., object] = subprocess.run) -> None:
    """Agents that hang must not hold it up."""
    run(["systemctl", "kill", "--signal=SIGKILL", "valohai-agent@*.service"], check=False)
    run(list(POWER_OFF), check=False)


def _word_comes(places: Places, machine: Machine, hostname: str) -> bool:
    try:
        places.save(refresh(machine, hostname=hostname))
    except AgentError as error:
        logger.warning("no word from the control plane: %s", error, extra={"action": "no-word"})
        return False
    return True


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _booted_at(places: Places) -> float:
    """Of this container or machine: process 1 is as old as it."""
    try:
        fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _touched(places.machine_file)
    return time.time() - uptime + ticks / 100
