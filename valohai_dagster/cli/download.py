"""Files out of stores, many at once: checked, never half, never over something else."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from valohai_dagster.cli.transfer_batch import run_batch
from valohai_dagster.data.datums import Datum
from valohai_dagster.data.transfers import Mover, Progress, fetch_datum
from valohai_dagster.stores.registry import Stores


def download_all(
    items: Sequence[tuple[Datum, Path]], stores: Stores, *, overwrite: bool = False
) -> None:
    """Fetches each datum to its place; a file that is there already with this content is left alone."""
    stop = threading.Event()

    def fetch(item: tuple[Datum, Path], progress: Progress) -> None:
        datum, target = item
        values = {"stores": stores, "mover": mover, "overwrite": overwrite, "progress": progress}
        fetch_datum(datum, target, **values)

    total = sum(datum.size for datum, _ in items)
    with Mover(stop) as mover:
        for _ in run_batch(items, fetch, total_bytes=total, label="downloading", stop=stop):
            pass
