"""A process that looks after a group is killed (SIGKILL) between any two writes, and another one takes over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_no_death_of_a_reconciler_leaks_doubles_or_loses_anything(tmp_path: Path) -> None:
    """Real processes and records, at every point around each write to the records and each call to the cloud."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.mortal_reconciler", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    endings = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(endings) > 35
    good = {
        "done": 3,
        "waiting": 0,
        "alive": 0,
        "made": 2,
        "most": 2,
        "taken_while_busy": 0,
        "told": 2,
        "known": 0,
        "open": 0,
    }
    assert [one for one in endings if good.items() - one.items()] == []
