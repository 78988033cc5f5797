"""The fleet as a process of its own, for benchmarks and tests that kill everything around it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.fleet.profile import Profile
from tests.support.ports import wait_for

END_SECONDS = 10.0


class FleetProcess:
    """Use as a context manager. `trace` gets one line of JSON per delivered report."""

    def __init__(
        self,
        url: str,
        deployment: str,
        profile: Profile,
        *,
        log: Path,
        trace: Path | None = None,
    ) -> None:
        self.trace = trace
        arguments = [url, deployment, profile.to_json(), *([str(trace)] if trace else [])]
        self._log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fleet", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
            )

    def __enter__(self) -> FleetProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stats(self) -> dict[str, Any]:
        return self._ask("stats")

    def let_end(self) -> dict[str, Any]:
        """Held commands end, and those that start later do not wait."""
        return self._ask("let-end")

    def wait_for(self, name: str, number: int, *, seconds: float) -> dict[str, Any]:
        """The counts as soon as that one has reached the number."""

        def reached() -> dict[str, Any]:
            stats = self.stats()
            return stats if stats.get(name, 0) >= number else {}

        return wait_for(reached, seconds=seconds, every=0.2, what=f"{number} {name}")

    def reports(self) -> list[dict[str, Any]]:
        """What was delivered so far, oldest first."""
        self.stats()  # flushes
        return (
            [json.loads(line) for line in self.trace.read_text().splitlines()] if self.trace else []
        )

    def end(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, operation: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": operation}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise AssertionError(f"the fleet is gone:\n{self.log()}") from error
        answer = self._process.stdout.readline()
        assert answer, f"the fleet is gone:\n{self.log()}"
        return json.loads(answer)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]
