"""Ours as it is measured: the agent's engine in a process of its own, called as inputs.py and outputs.py call it.

    python -m bench.transfers.ours TASK.json

Prints seconds and CPU seconds of the transfers alone: an agent runs already when a job comes.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from valohai_agent.protocol import Checksums, Parts, Transfer, UploadGrant
from valohai_agent.transfer import PARALLEL_FILES, Transferer

PART_BYTES = 64 * 1024 * 1024  # what valohai_dagster/stores/s3.py grants
LARGE_BYTES = 16 * 1024 * 1024
LARGE_PARALLEL = 4  # as in inputs.py


def main() -> None:
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    transferer = Transferer(algorithms=tuple(task["algorithms"]))
    move = _download if task["way"] == "down" else _upload
    large = max(task["sizes"]) >= LARGE_BYTES
    started, spent = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(LARGE_PARALLEL if large else PARALLEL_FILES) as pool:
        found = list(
            pool.map(
                lambda item: move(transferer, task, *item),
                zip(task["names"], task["sizes"], strict=True),
            )
        )
    seconds, cpu = time.perf_counter() - started, time.process_time() - spent
    print(json.dumps({"seconds": seconds, "cpu": cpu, "sha256": found[0].sha256}))


def _download(transferer: Transferer, task: dict[str, Any], name: str, size: int) -> Checksums:
    url = f"{task['endpoint']}/{name}"
    target = Path(task["directory"]) / Path(name).name
    return transferer.download(Transfer(url=url), target, name=name, size=size).checksums


def _upload(transferer: Transferer, task: dict[str, Any], name: str, size: int) -> Checksums:
    base = Path(name).name
    url = f"{task['endpoint']}/{task['bucket']}/up/{base}"
    parts = None
    if size > PART_BYTES:
        numbers = range(1, -(-size // PART_BYTES) + 1)
        parts = Parts(
            style="s3",
            part_bytes=PART_BYTES,
            parts={
                number: Transfer(url=f"{url}?partNumber={number}&uploadId=u", method="PUT")
                for number in numbers
            },
            finish=Transfer(url=f"{url}?uploadId=u", method="POST"),
        )
    grant = UploadGrant(upload_id="u", transfer=Transfer(url=url, method="PUT"), parts=parts)
    return transferer.upload(Path(task["directory"]) / base, grant, name=name).checksums


if __name__ == "__main__":
    main()
