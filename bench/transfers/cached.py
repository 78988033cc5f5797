"""Start from the cache: the same large input twice, placed as a job would have it placed; seconds of the second time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from valohai_agent.cache.local import InputCache
from valohai_agent.inputs import InputFetcher, InputOptions
from valohai_agent.protocol import JobFile, JobInput, Transfer
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace


def main() -> None:
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    root = Path(task["directory"])
    cache = InputCache(root / "cache")
    seconds = []
    for attempt in (1, 2):
        workspace = Workspace.create(root / "work", "bench", attempt, "bench")
        fetcher = InputFetcher(
            workspace,
            valohai_dir="/valohai",
            transferer=Transferer(),
            options=InputOptions(cache=cache),
            status=lambda text: None,
            on_ready=lambda report: None,
        )
        (name,), (size,) = task["names"], task["sizes"]
        file = JobFile(id="f", name="big", uri=f"datum://{name}", size=size, datum_id=name)
        started = time.perf_counter()
        fetcher.fetch(
            [JobInput(name="data", input_id="i", files=[file])],
            {"f": Transfer(url=f"{task['endpoint']}/{name}")},
        )
        seconds.append(time.perf_counter() - started)
        assert (workspace.inputs / "data" / "big").stat().st_size == size
        workspace.remove()
    print(json.dumps({"fetched": seconds[0], "cached": seconds[1]}))


if __name__ == "__main__":
    main()
