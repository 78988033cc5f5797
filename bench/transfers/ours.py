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
from valohai_agent.transfer import SmallDownload, SmallUpload, Transferer

PART_BYTES = 64 * 1024 * 1024  # what valohai_dagster/stores/s3.py grants
SMALL_BYTES = 1024 * 1024
LARGE_PARALLEL = 4  # as in inputs.py


def main() -> None:
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    transferer = Transferer(algorithms=tuple(task["algorithms"]))
    way = _Ways(transferer, task)
    small = max(task["sizes"]) <= SMALL_BYTES
    started, spent = time.perf_counter(), time.process_time()
    found = way.move_small() if small else way.move_large()
    seconds, cpu = time.perf_counter() - started, time.process_time() - spent
    print(json.dumps({"seconds": seconds, "cpu": cpu, "sha256": found[0].sha256}))


class _Ways:
    def __init__(self, transferer: Transferer, task: dict[str, Any]) -> None:
        self._transferer, self._task = transferer, task
        self._directory = Path(task["directory"])
        self._down = task["way"] == "down"

    def move_large(self) -> list[Checksums]:
        move = self._download if self._down else self._upload
        with ThreadPoolExecutor(LARGE_PARALLEL) as pool:
            return list(pool.map(move, self._task["names"], self._task["sizes"]))

    def move_small(self) -> list[Checksums]:
        """All by one lane, none of which may come back undone."""
        names, sizes = self._task["names"], self._task["sizes"]
        if self._down:
            wanted = [self._wanted(*item) for item in zip(names, sizes, strict=True)]
            moved = [result for _, result in self._transferer.download_small(wanted)]
        else:
            files = [self._file(*item) for item in zip(names, sizes, strict=True)]
            moved = [result for _, result in self._transferer.upload_small(files)]
        return [one.checksums for one in moved if one is not None]

    def _download(self, name: str, size: int) -> Checksums:
        target = self._directory / Path(name).name
        transfer = Transfer(url=f"{self._task['endpoint']}/{name}")
        return self._transferer.download(transfer, target, name=name, size=size).checksums

    def _wanted(self, name: str, size: int) -> SmallDownload:
        transfer = Transfer(url=f"{self._task['endpoint']}/{name}")
        target = self._directory / Path(name).name
        return SmallDownload(transfer=transfer, target=target, name=name, size=size)

    def _upload(self, name: str, size: int) -> Checksums:
        source = self._directory / Path(name).name
        return self._transferer.upload(source, self._grant(name, size), name=name).checksums

    def _file(self, name: str, size: int) -> SmallUpload:
        source = self._directory / Path(name).name
        return SmallUpload(
            opens=lambda: source.open("rb"), grant=self._grant(name, size), name=name
        )

    def _grant(self, name: str, size: int) -> UploadGrant:
        url = f"{self._task['endpoint']}/{self._task['bucket']}/up/{Path(name).name}"
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
        return UploadGrant(upload_id="u", transfer=Transfer(url=url, method="PUT"), parts=parts)


if __name__ == "__main__":
    main()
