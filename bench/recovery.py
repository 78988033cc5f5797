"""Whether anything is lost or happens twice when conductors, Redis and Postgres die under a load.

Each scenario is one load of executions in every phase and many disasters at random moments: `kill -9` of the conductor and
a restart, with a second conductor, and between Dagster's separate commits; Redis killed and restarted, with and without
its data; Postgres stopped. Everything but the work is real (see bench/fleet.py). When the load has ended:

    lost     runs or executions without an end or with a wrong one, events and index entries that are missing
    doubled  more than one materialization, step success or terminal event; outputs accepted twice
    left     pool slots, queue entries and keys that nobody will remove

    python -m bench.recovery [--executions N] [--rounds N] [--seed N] [--scenario TEXT ...] [--quick]

The last line is JSON: rounds (disasters), lost, doubled and more.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.disasters import DISASTERS, Outcome, Plan, play

KEPT = Path(tempfile.gettempdir()) / "valohai-recovery"  # what a failed scenario leaves to look at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--executions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=20, help="disasters per scenario")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--scenario", nargs="*", default=[], help="parts of names; default: all")
    parser.add_argument("--quick", action="store_true", help="small, to see it work")
    given = parser.parse_args()
    size: dict[str, Any] = {"executions": given.executions, "disasters": given.rounds}
    if given.quick:
        size = {"executions": 40, "disasters": 3, "seconds": 8.0, "patience": 120.0}
    outcomes = [
        run(name, Plan(seed=given.seed + number, **size))
        for number, name in enumerate(DISASTERS)
        if not given.scenario or any(part in name for part in given.scenario)
    ]
    report(outcomes, given.seed)
    if not all(outcome.findings.good for outcome in outcomes):
        sys.exit(1)


def run(name: str, plan: Plan) -> Outcome:
    print(f"{name}: {plan.executions} executions, seed {plan.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vhb-", dir="/tmp") as work:
        outcome = play(name, plan, Path(work), DISASTERS[name])
        if not outcome.findings.good:
            keep(Path(work), name)
    print(outcome.findings, flush=True)
    return outcome


def keep(work: Path, name: str) -> None:
    """The logs of a scenario that failed."""
    for log in work.rglob("*.log"):
        target = KEPT / name.replace(" ", "-") / log.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(log.read_bytes())
    print(f"logs are kept in {KEPT}", flush=True)


def report(outcomes: Sequence[Outcome], seed: int) -> None:
    table = Table(title=f"Recovery (seed {seed})")
    for heading in (
        "",
        "disasters",
        "executions",
        "lost",
        "doubled",
        "left",
        "restarted",
        "seconds",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for one in outcomes:
        found = one.findings
        table.add_row(
            one.name,
            str(one.disasters),
            str(found.executions),
            *(str(len(lines)) for lines in (found.lost, found.doubled, found.left)),
            str(found.restarted),
            f"{one.seconds:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    for one in outcomes:
        console.print(f"{one.name}: struck at {dict(one.points)} while {dict(one.phases)}")
    print(json.dumps(figures(outcomes, seed)))


def figures(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    return {
        "rounds": sum(one.disasters for one in outcomes),
        "lost": sum(len(one.findings.lost) for one in outcomes),
        "doubled": sum(len(one.findings.doubled) for one in outcomes),
        "left": sum(len(one.findings.left) for one in outcomes),
        "seed": seed,
        "scenarios": {
            one.name: {
                "seed": one.seed,
                "rounds": one.disasters,
                "executions": one.findings.executions,
                "lost": len(one.findings.lost),
                "doubled": len(one.findings.doubled),
                "left": len(one.findings.left),
                "restarted": one.findings.restarted,
                "seconds": round(one.seconds, 1),
            }
            for one in outcomes
        },
    }


if __name__ == "__main__":
    main()
