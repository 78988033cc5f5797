"""Tells about inputs that are in place: lines of the log (I-31), reports (I-32) and progress, however many there are."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from valohai_agent.checksums import decimal_size
from valohai_agent.input_plan import InputFile, Placed
from valohai_agent.protocol import MAX_INPUTS_READY, InputReady, InputsReady

MANY_FILES = 100  # of one input: with more the log has the first ones and a summary
SHOWN_FILES = 10
BATCH_SECONDS = 1.0
PROGRESS_SECONDS = 0.25


@dataclass
class _Sum:
    files: int = 0
    size: int = 0
    cached: int = 0


class InputNews:
    """Safe to use from several threads; each call costs the same, however many files there are.

    `batches`: the control plane understands many files in one report.
    """

    def __init__(
        self,
        files: Mapping[str, int],
        *,
        shown: Callable[[InputFile], str],
        status: Callable[[str], None],
        report: Callable[[InputReady | InputsReady], None],
        batches: bool,
        progress: Callable[[int, int | None], None] | None,
        total: int | None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """`files`: how many each input has. `total`: bytes of all of them, if known. `warn`: `status` without it."""
        self._files, self._shown = files, shown
        self._status, self._report, self._batches = status, report, batches
        self._warn, self._changed = warn or status, 0
        self._progress, self._total = progress, total
        self._lock = threading.Lock()
        self._sums: dict[str, _Sum] = defaultdict(_Sum)
        self._waiting: list[InputReady] = []
        self._report_due = 0.0
        self._done: dict[InputFile, int] = {}
        self._done_bytes = 0
        self._progress_due = 0.0

    def ready(self, item: InputFile, placed: Placed) -> None:
        """The file is in its place."""
        self._resize(item, placed.size)
        self.moved(item, placed.size)
        report = InputReady(
            input=item.input,
            file_id=item.file.id,
            name=item.file.name,
            size=placed.size,
            checksums=placed.checksums,
            cached=placed.cached,
            version=placed.version,
        )
        with self._lock:
            self._tell(item, placed)
            self._add(report)

    def moved(self, item: InputFile, done: int) -> None:
        """So many bytes of the file have arrived."""
        if self._progress is None:
            return
        with self._lock:
            self._done_bytes += done - self._done.get(item, 0)
            self._done[item] = done
            now = time.monotonic()
            if now < self._progress_due:
                return
            self._progress_due = now + PROGRESS_SECONDS
            done = self._done_bytes
        self._progress(done, self._total)

    def changed(self, item: InputFile, words: str) -> None:
        """The file is another than the execution was created with; after the first ones they are only counted."""
        with self._lock:
            self._changed += 1
            if self._changed > SHOWN_FILES:
                return
        self._warn(f"{self._shown(item)}: {words}")

    def say(self, item: InputFile, text: str) -> None:
        self._status(f"{self._shown(item)}: {text}")

    def close(self) -> None:
        """All that waits is said, and what the inputs of many files have come to."""
        with self._lock:
            self._flush()
            for name, one in self._sums.items():
                if self._files[name] > MANY_FILES:
                    fresh = one.files - one.cached
                    self._status(
                        f"input {name!r}: {one.files:,} files, {decimal_size(one.size)}; "
                        f"{fresh:,} downloaded, {one.cached:,} from cache"
                    )
            done, more = self._done_bytes, self._changed - SHOWN_FILES
        if more > 0:
            self._warn(f"{more:,} more input files have changed since the execution was created")
        if self._progress is not None and self._done:
            self._progress(done, self._total)

    def words(self) -> str | None:
        """`inputs: 12 files, 3 from cache`; None when there were none."""
        with self._lock:
            files = sum(one.files for one in self._sums.values())
            cached = sum(one.cached for one in self._sums.values())
        noun = "file" if files == 1 else "files"
        return f"inputs: {files:,} {noun}, {cached:,} from cache" if files else None

    def _resize(self, item: InputFile, size: int) -> None:
        """The file may be larger or smaller than it was when somebody looked."""
        if self._total is not None and item.file.size is not None:
            with self._lock:
                self._total += size - item.file.size

    # -- inside, with the lock held -------------------------------------------------------------------------------
    def _tell(self, item: InputFile, placed: Placed) -> None:
        """The four lines of a file stay together."""
        one = self._sums[item.input]
        one.files += 1
        one.size += placed.size
        one.cached += placed.cached
        many = self._files[item.input] > MANY_FILES
        if many and one.files > SHOWN_FILES:
            return
        path, sums = self._shown(item), placed.checksums
        verb = "from cache" if placed.cached else "downloaded"
        self._status(f"{path}: {verb}, {decimal_size(placed.size)}")
        if not placed.cached:
            self._status(f"{path}: md5 sum: {sums.md5}")
            self._status(f"{path}: sha1 sum: {sums.sha1}")
            self._status(f"{path}: sha256 sum: {sums.sha256}")
        if many and one.files == SHOWN_FILES:
            rest = self._files[item.input] - SHOWN_FILES
            self._status(f"input {item.input!r}: {rest:,} more files are not listed here")

    def _add(self, report: InputReady) -> None:
        if not self._batches:
            self._report(report)
            return
        now = time.monotonic()
        if not self._waiting:
            self._report_due = now + BATCH_SECONDS
        self._waiting.append(report)
        if len(self._waiting) >= MAX_INPUTS_READY or now > self._report_due:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if len(waiting) == 1:
            self._report(waiting[0])
        elif waiting:
            self._report(InputsReady(files=waiting))
