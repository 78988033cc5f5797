"""The fleet as a process: commands as lines of JSON on standard input, answers on standard output.

    python -m tests.support.fleet URL DEPLOYMENT PROFILE_JSON [TRACE_FILE]

`{"op": "stats"}` answers with the counts; `{"op": "let-end"}` lets held commands end; the end of the input ends the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from typing import TextIO

from tests.support.fleet.fleet import SimulatedFleet
from tests.support.fleet.profile import Profile


async def main(url: str, deployment: str, profile: str, trace: TextIO | None) -> None:
    def write(execution_id: str, run_id: str | None, kind: str, at: float) -> None:
        if trace is not None:
            trace.write(json.dumps({"e": execution_id, "r": run_id, "k": kind, "t": at}) + "\n")

    fleet = SimulatedFleet(url, deployment, Profile.from_json(profile), trace=write)
    work = asyncio.create_task(fleet.run())
    control = asyncio.create_task(_obey(fleet, trace))
    await asyncio.wait({work, control}, return_when=asyncio.FIRST_COMPLETED)
    for task in (work, control):
        task.cancel()
    for task in (work, control):
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _obey(fleet: SimulatedFleet, trace: TextIO | None) -> None:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    while line := await reader.readline():
        operation = json.loads(line)["op"]
        if operation == "let-end":
            fleet.let_end.set()
        if trace is not None:
            trace.flush()
        print(json.dumps(fleet.stats()), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    path = sys.argv[4] if len(sys.argv) > 4 else None
    with open(path, "a") if path else contextlib.nullcontext() as file:
        asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], file))
