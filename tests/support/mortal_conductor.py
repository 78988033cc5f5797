"""The conductor, which kills itself (SIGKILL) at a chosen point of its writing; for recovery tests.

    VALOHAI_TEST_DEATH=POINT:N python -m tests.support.mortal_conductor

dies when it passes the point for the N-th time. The points lie between commits that belong together (DAGSTER_NOTES 9), and
between a commit and what follows from it. The product knows nothing of them: the methods are wrapped here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

VARIABLE = "VALOHAI_TEST_DEATH"


class Death:
    """Counts the passages of one point."""

    def __init__(self, point: str, number: int) -> None:
        self._point, self._number = point, number
        self._passages = itertools.count(1)

    def passes(self, point: str) -> None:
        if point == self._point and next(self._passages) == self._number:
            os.kill(os.getpid(), signal.SIGKILL)


def _before(cls: Any, method: str, point: str, death: Death) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def dying(self: Any, *args: Any, **values: Any) -> Any:
        death.passes(point)
        return original(self, *args, **values)

    setattr(cls, method, dying)


def _after(cls: Any, method: str, point: str, death: Death) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def dying(self: Any, *args: Any, **values: Any) -> Any:
        result = original(self, *args, **values)
        death.passes(point)
        return result

    setattr(cls, method, dying)


def _around_async(cls: Any, method: str, name: str, death: Death) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    async def dying(self: Any, *args: Any, **values: Any) -> Any:
        death.passes(f"before-{name}")
        result = await original(self, *args, **values)
        death.passes(f"after-{name}")
        return result

    setattr(cls, method, dying)


def _dagster(death: Death) -> None:
    from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
    from dagster._core.storage.runs.sql_run_storage import SqlRunStorage
    from dagster_postgres.event_log.event_log import PostgresEventLogStorage

    _before(PostgresEventLogStorage, "store_event", "before-log-row", death)
    # The row is committed; tags and index of its asset are the next transaction.
    _before(SqlEventLogStorage, "_store_asset_event_tags", "before-asset-index", death)
    _after(PostgresEventLogStorage, "store_event", "after-asset-index", death)
    _before(SqlRunStorage, "handle_run_event", "before-run-status", death)
    _after(SqlRunStorage, "handle_run_event", "after-run-status", death)
    for name in ("free_concurrency_slots_for_run", "free_concurrency_slot_for_step"):
        _before(SqlEventLogStorage, name, "before-slot-freed", death)
        _after(SqlEventLogStorage, name, "after-slot-freed", death)
    _after(SqlEventLogStorage, "claim_concurrency_slot", "after-slot-claimed", death)


def _service(death: Death) -> None:
    from valohai_dagster.executions.dispatch import Dispatch
    from valohai_dagster.records.engine import Records

    original = Records.write

    @contextlib.contextmanager
    def write(self: Records) -> Iterator[Any]:
        with original(self) as connection:
            yield connection
            death.passes("before-records-commit")
        death.passes("after-records-commit")

    setattr(Records, "write", write)  # noqa: B010 - pyright knows it as a method
    for method, name in (("enqueue", "queued"), ("deliver", "told")):
        _around_async(Dispatch, method, name, death)


POINTS: dict[str, float] = {  # point -> roughly how often one execution passes it
    "before-log-row": 10,
    "before-asset-index": 1,
    "after-asset-index": 10,
    "before-run-status": 1,
    "after-run-status": 1,
    "before-slot-freed": 1,
    "after-slot-freed": 1,
    "after-slot-claimed": 0.2,
    # The service does many at once: under load one passage serves several executions.
    "before-records-commit": 0.5,
    "after-records-commit": 0.5,
    "before-queued": 0.1,
    "after-queued": 0.1,
    "before-told": 0.5,
    "after-told": 0.5,
}
BETWEEN_COMMITS = ("before-asset-index", "before-run-status", "after-run-status")
WRAPPERS: tuple[Callable[[Death], None], ...] = (_dagster, _service)


def main() -> None:
    point, _, number = os.environ[VARIABLE].partition(":")
    if point not in POINTS:
        raise SystemExit(f"{VARIABLE}: {point!r} is not one of {', '.join(POINTS)}")
    death = Death(point, int(number))
    for wrap in WRAPPERS:
        wrap(death)
    sys.argv = ["valohai-dagster", "conductor"]
    from valohai_dagster.cli import main as command

    command()


if __name__ == "__main__":
    main()
