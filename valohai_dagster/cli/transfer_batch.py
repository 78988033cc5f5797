"""Several transfers at once, with one bar; an interrupt stops all of them at their next piece."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from valohai_agent.transfer import PARALLEL_FILES
from valohai_dagster.data.transfers import Progress

WORKERS = PARALLEL_FILES  # files at once
T = TypeVar("T")
R = TypeVar("R")


class Stopped(Exception):
    """Raised inside the transfers of a batch that ends early."""


def run_batch(
    items: Sequence[T],
    work: Callable[[T, Progress], R],
    *,
    total_bytes: int,
    label: str,
    stop: threading.Event,
) -> Iterator[R]:
    """Results as they come. The first error, and an interrupt, stops the others and is raised when they have ended.

    `stop` is set then; what the work does may look at it.
    """
    with _bar(total_bytes, label) as advance:

        def progress(amount: int) -> None:
            if stop.is_set():
                raise Stopped
            advance(amount)

        pool = ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="transfer")
        try:
            waiting: set[Future[R]] = {pool.submit(work, item, progress) for item in items}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _bar(total: int, label: str) -> Iterator[Progress]:
    """On standard error, only where somebody looks at it."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)
