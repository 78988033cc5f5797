"""obstore as it is measured, in the peers' environment: ranges and parts in parallel, files in threads.

Like ours it is a library, so its seconds are those of the transfers alone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore  # pyright: ignore[reportMissingImports]
from obstore.store import S3Store  # pyright: ignore[reportMissingImports]

RANGE_BYTES = 4 * 1024 * 1024
LARGE_BYTES = 128 * 1024 * 1024
CONNECTIONS = 8


def main() -> None:
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    store = S3Store(
        task["bucket"],
        endpoint=task["endpoint"],
        region="us-east-1",
        skip_signature=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    move = _download if task["way"] == "down" else _upload
    started, spent = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(
            pool.map(
                lambda item: move(store, task, *item),
                zip(task["names"], task["sizes"], strict=True),
            )
        )
    seconds, cpu = time.perf_counter() - started, time.process_time() - spent
    print(json.dumps({"seconds": seconds, "cpu": cpu}))


def _download(store: Any, task: dict[str, Any], name: str, size: int) -> None:
    key, target = name.partition("/")[2], Path(task["directory"]) / Path(name).name
    if size < LARGE_BYTES:
        with target.open("wb") as file:
            if size <= RANGE_BYTES:
                file.write(memoryview(obstore.get(store, key).bytes()))
                return
            for chunk in obstore.get(store, key).stream(min_chunk_size=RANGE_BYTES):
                file.write(memoryview(chunk))
        return
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    starts, lock = iter(range(0, size, RANGE_BYTES)), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            end = min(size, start + RANGE_BYTES)
            os.pwrite(fd, memoryview(obstore.get_range(store, key, start=start, end=end)), start)

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)


def _upload(store: Any, task: dict[str, Any], name: str, size: int) -> None:
    base = Path(name).name
    source = Path(task["directory"]) / base
    large = size >= LARGE_BYTES
    obstore.put(
        store,
        f"up/{base}",
        source,
        use_multipart=large,
        chunk_size=16 * 1024 * 1024,
        max_concurrency=CONNECTIONS,
    )


if __name__ == "__main__":
    main()
