"""Collects `/valohai/outputs`: live while the command runs, the rest at its end (CONTRACT 6)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from valohai_agent.beneath import Place
from valohai_agent.checksums import decimal_size
from valohai_agent.errors import AgentError, Conflict, Denied, OutputError
from valohai_agent.linked import CopyOut, LinkedFiles
from valohai_agent.output_tree import TreeFile, regular_files, uploadable_files
from valohai_agent.printable import printable
from valohai_agent.protocol import (
    MAX_GRANT_REQUESTS,
    GrantRequest,
    Grants,
    OutputStored,
    UploadGrant,
)
from valohai_agent.sidecars import (
    COLLECTION,
    SUFFIX,
    Collection,
    normal_name,
    read_collection,
    read_sidecar,
    sidecar_target,
)
from valohai_agent.transfer import (
    PARALLEL_FILES,
    SmallUpload,
    Transferer,
    Transferred,
    is_small,
)
from valohai_agent.upload_grants import further_parts, granted
from valohai_agent.workspace import Workspace

log = logging.getLogger(__name__)

QUIET_SECONDS = 0.5  # a read-only file that was written this recently may still be copied
RETRY_SECONDS = 10.0  # between tries of a live file that could not be uploaded
LOGGED_FILES = 100  # above that, uploads are counted instead of named
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OutputSummary:
    """What became of the outputs. `problems` turn `complete` into `error` (O-18)."""

    stored: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Output:
    name: str
    place: Place
    size: int
    metadata: dict[str, Any] = field(default_factory=dict)
    live: bool = False


class OutputCollector:
    """Uploads outputs and reports each as one datum.

    `request_grants` asks the control plane (at most MAX_GRANT_REQUESTS at a time) and blocks until it
    answers. `report` takes each stored output; a second report with the same `upload_id` replaces the
    metadata, which happens when `valohai.metadata.jsonl` names a live output only later (O-08).
    `status` writes to the status stream; `warn` reports a warning as well. `make_readable` is
    `Runtime.make_readable`.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        transferer: Transferer,
        request_grants: Callable[[list[GrantRequest]], Grants],
        report: Callable[[OutputStored], None],
        status: Callable[[str], None],
        warn: Callable[[str], None],
        progress: Callable[[int, int | None], None] | None = None,
        make_readable: Callable[[Path], None] | None = None,
        valohai_dir: str = "/valohai",
        parallel: int = PARALLEL_FILES,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._workspace = workspace
        self._transferer = transferer
        self._request_grants = request_grants
        self._report = report
        self._status = status
        self._warn = _once(warn)
        self._progress = progress
        self._make_readable = make_readable
        self._valohai_dir = valohai_dir
        self._linked = LinkedFiles(workspace, valohai_dir)
        self._parallel = parallel
        self._now = now
        self._lock = threading.Lock()
        self._scan_lock = threading.Lock()
        self._request_ids = itertools.count(1)
        self._spooled = itertools.count(1)
        self._waiting: list[_Output] = []
        self._retry_at = 0.0
        self._live_reports: list[OutputStored] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stored = self._bytes = 0
        self._sent: dict[Place, int] = {}
        self._sent_together = 0

    def start_live(self, *, interval_seconds: float = 1.0) -> None:
        """Starts the thread that picks up read-only files (O-03, O-04)."""
        self._thread = threading.Thread(
            target=self._watch, args=(interval_seconds,), name="live-outputs", daemon=True
        )
        self._thread.start()

    def scan_now(self) -> int:
        """Picks up and uploads read-only files now; gives how many were stored."""
        with self._scan_lock:
            self._pick_up()
            if not self._waiting or self._now() < self._retry_at:
                return 0
            return len(self._waiting) - len(self._upload_waiting())

    def keep_linked(self, copy_out: CopyOut) -> None:
        """Copies what links lead to outside of the job's directories; before the container is removed."""
        self._linked.keep(copy_out, self._status)

    def finish(self) -> OutputSummary:
        """Ends the live thread and uploads everything that is left, however the command ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._scan_lock:
            self._open_tree()
            live, self._waiting = self._waiting, []
            problems = [*self._linked.problems, *self._upload([*live, *self._remaining()])]
            self._late_metadata()
        if self._stored:
            self._status(f"uploaded {self._stored} outputs, {decimal_size(self._bytes)}")
        return OutputSummary(stored=self._stored, bytes=self._bytes, problems=problems)

    # -- live --------------------------------------------------------------------------------------
    def _watch(self, interval_seconds: float) -> None:
        while not self._stop.wait(interval_seconds):
            try:
                self.scan_now()
            except Exception as error:  # noqa: BLE001 - a loop's outermost frame: the end of the run tries again
                self._retry_at = self._now() + RETRY_SECONDS
                log.warning("live outputs: %s", error, extra={"action": "live-outputs"})

    def _pick_up(self) -> None:
        """Moves read-only files to the spool, so that their path can be written again (O-03)."""
        collection: Collection | None = None
        for file in list(regular_files(self._workspace.outputs)):
            if not self._is_ready(file):
                continue
            if collection is None:
                collection = read_collection(self._in_outputs(COLLECTION), lambda message: None)
            metadata, sidecar = self._sidecar_of(file)
            spooled = self._spool(file)
            if spooled is None:
                continue
            if sidecar is not None:
                with contextlib.suppress(OSError):  # its directory is another one now
                    sidecar.remove()
            metadata.update(collection.by_name.get(normal_name(file.name), {}))
            size = file.status.st_size
            self._waiting.append(
                _Output(name=file.name, place=spooled, size=size, metadata=metadata, live=True)
            )
            self._retry_at = 0.0

    def _is_ready(self, file: TreeFile) -> bool:
        if file.status.st_mode & 0o222 or file.relative == COLLECTION:
            return False
        target = sidecar_target(file.relative)
        if target is not None and self._is_file(target):
            return False
        return self._now() - file.status.st_mtime >= QUIET_SECONDS

    def _in_outputs(self, relative: str) -> Place:
        return Place(root=self._workspace.outputs, relative=relative)

    def _is_file(self, relative: str) -> bool:
        """Whether the outputs have such a file, or a link that may lead to one."""
        try:
            return not stat.S_ISDIR(self._in_outputs(relative).status().st_mode)
        except OSError:
            return False

    def _spool(self, file: TreeFile) -> Place | None:
        directory = self._workspace.run / "spool"
        directory.mkdir(exist_ok=True)
        target = Place(root=directory, relative=str(next(self._spooled)))
        try:
            return target if file.place.move(target, file.status) else None
        except OSError:  # another user's directory; the end of the run takes it
            return None

    def _upload_waiting(self) -> list[_Output]:
        batch, self._waiting = self._waiting, []
        failed: list[_Output] = []
        try:
            for problem in self._upload(batch, failed=failed):
                self._status(f"{problem} It is tried again until the run ends.")
        except Exception:
            done = {report.name for report in self._live_reports}
            failed = [output for output in batch if output.name not in done]
            raise
        finally:
            self._waiting = failed
            if failed:
                self._retry_at = self._now() + RETRY_SECONDS
        return failed

    def _late_metadata(self) -> None:
        """Reads the jsonl again for outputs that went before it was written (O-08)."""
        place = self._in_outputs(COLLECTION)
        by_name = read_collection(place, lambda message: None).by_name
        for report in self._live_reports:
            extra = by_name.get(normal_name(report.name))
            if extra and {**report.metadata, **extra} != report.metadata:
                merged = {**report.metadata, **extra}
                self._report(report.model_copy(update={"metadata": merged}))

    # -- the end of the run ------------------------------------------------------------------------
    def _open_tree(self) -> None:
        if self._make_readable is None:
            return
        try:
            self._make_readable(self._workspace.outputs)
        except (AgentError, OSError) as error:
            self._warn(f"Some outputs may be unreadable: {error}")

    def _remaining(self) -> list[_Output]:
        files = uploadable_files(self._workspace, self._valohai_dir, self._warn, self._linked.found)
        collection = read_collection(self._in_outputs(COLLECTION), self._warn)
        consumed: set[str] = {COLLECTION} if collection.valid else set()
        metadata: dict[str, dict[str, Any]] = {}
        for file in files:
            metadata[file.relative], sidecar = self._sidecar_of(file)
            if sidecar is not None:
                consumed.add(file.relative + SUFFIX)
        outputs = []
        for file in files:
            if file.relative in consumed:
                continue
            extra = collection.by_name.get(normal_name(file.name), {})
            merged = {**metadata[file.relative], **extra}
            size = file.status.st_size
            outputs.append(_Output(name=file.name, place=file.place, size=size, metadata=merged))
        self._warn_unknown(collection, {output.name for output in outputs})
        return outputs

    def _sidecar_of(self, file: TreeFile) -> tuple[dict[str, Any], Place | None]:
        """Metadata of the file's own sidecar, and the sidecar when it was good."""
        place = self._in_outputs(file.relative + SUFFIX)
        try:
            place.status()
        except OSError:
            return {}, None
        metadata = read_sidecar(place, file.name + SUFFIX, self._warn)
        return (metadata, place) if metadata is not None else ({}, None)

    def _warn_unknown(self, collection: Collection, names: set[str]) -> None:
        names |= {normal_name(report.name) for report in self._live_reports}
        names |= {normal_name(name) for name in names}
        unknown = [name for name in collection.by_name if name not in names]
        if unknown:
            shown = ", ".join(repr(name) for name in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            self._warn(f"{COLLECTION} names files that are not in the outputs: {shown}{more}.")

    # -- uploading ---------------------------------------------------------------------------------
    def _upload(self, outputs: Sequence[_Output], failed: list[_Output] | None = None) -> list[str]:
        total = sum(output.size for output in outputs)
        problems: list[str] = []
        for batch in _chunks(outputs, MAX_GRANT_REQUESTS):
            grants = self._grants(batch)
            found = self._upload_batch(grants, total)
            problems += found.values()
            if failed is not None:
                failed += found
        return problems

    def _upload_batch(
        self, grants: Sequence[tuple[_Output, UploadGrant | str]], total: int
    ) -> dict[_Output, str]:
        """Small files by a lane of the transferer, while threads send the others; the problems of those that failed."""
        small = {
            SmallUpload(opens=output.place.open, grant=grant, name=_label(output)): output
            for output, grant in grants
            if isinstance(grant, UploadGrant)
            and grant.parts is None
            and is_small(grant.transfer, output.size)
        }
        by_lane = set(small.values())
        problems: dict[_Output, str] = {}
        with ThreadPoolExecutor(max_workers=self._parallel) as pool:
            threads = [
                (output, pool.submit(self._try_upload, output, grant, total))
                for output, grant in grants
                if output not in by_lane
            ]
            for upload, moved in self._transferer.upload_small(small):
                output = small[upload]
                if moved is None:
                    again = pool.submit(self._try_upload, output, upload.grant, total)
                    threads.append((output, again))
                    continue
                self._count(output, moved.size, total)
                try:
                    self._stored_one(output, upload.grant, moved)
                except (AgentError, OSError) as error:
                    problems[output] = _problem(output, error)
        for output, thread in threads:
            problem = thread.result()
            if problem is not None:
                problems[output] = problem
        return problems

    def _grants(self, batch: Sequence[_Output]) -> list[tuple[_Output, UploadGrant | str]]:
        requests = [
            GrantRequest(
                id=f"output-{next(self._request_ids)}",
                kind="output",
                name=output.name,
                size=output.size,
            )
            for output in batch
        ]
        grants = self._request_grants(requests)
        return [
            (output, granted(grants, request.id))
            for output, request in zip(batch, requests, strict=True)
        ]

    def _try_upload(self, output: _Output, grant: UploadGrant | str, total: int) -> str | None:
        """Uploads and reports one file; the problem in words if that failed."""
        try:
            try:
                self._upload_one(output, grant, total)
            except (Denied, Conflict):  # the grant ran out while the file waited for its turn
                self._upload_one(output, self._grants([output])[0][1], total)
        except (AgentError, OSError) as error:
            return _problem(output, error)
        return None

    def _upload_one(self, output: _Output, grant: UploadGrant | str, total: int) -> None:
        if isinstance(grant, str):
            raise OutputError(grant)
        moved = self._transferer.upload(
            output.place.open,
            grant,
            name=_label(output),
            progress=lambda done, _: self._count(output, done, total),
            more=further_parts(self._request_grants, grant.upload_id),
        )
        self._stored_one(output, grant, moved)

    def _stored_one(self, output: _Output, grant: UploadGrant, moved: Transferred) -> None:
        """Reports it."""
        status = output.place.status()
        report = OutputStored(
            upload_id=grant.upload_id,
            name=output.name,
            size=moved.size,
            checksums=moved.checksums,
            metadata=output.metadata,
            live=output.live,
            file_ctime=datetime.fromtimestamp(status.st_ctime, timezone.utc),
            file_mtime=datetime.fromtimestamp(status.st_mtime, timezone.utc),
        )
        with self._lock:
            self._report(report)
            self._stored += 1
            self._bytes += moved.size
            if output.live:
                self._live_reports.append(report)
                output.place.remove()
            if self._stored <= LOGGED_FILES:
                shown = printable(f"{self._valohai_dir}/outputs/{output.name}")
                self._status(f"{shown}: uploaded, {decimal_size(moved.size)}")

    def _count(self, output: _Output, done: int, total: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._sent_together += done - self._sent.get(output.place, 0)
            self._sent[output.place] = done
            sent = self._sent_together
        self._progress(min(sent, total), total)


def _label(output: _Output) -> str:
    return f"output {output.name!r}"


def _problem(output: _Output, error: Exception) -> str:
    return f"Output {output.name!r} could not be stored: {error}."


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    """Lets each text through once: live scans see the same thing every second."""
    said: set[str] = set()

    def say(message: str) -> None:
        if message not in said:
            said.add(message)
            warn(message)

    return say
