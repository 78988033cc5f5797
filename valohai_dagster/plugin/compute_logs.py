"""`ValohaiComputeLogManager`: the log of an execution in the stdout and stderr tabs of the Dagster UI.

Name it in dagster.yaml:

    compute_logs:
      module: valohai_dagster.plugin.compute_logs
      class: ValohaiComputeLogManager

While an execution runs its lines come from Redis (rate-limited, with gap markers, M-02); afterwards the complete
files come from the log store. A step that ran as several executions or attempts shows them one after another.
Everything else, such as sensor ticks and steps that are not ours, is captured in local files as Dagster does.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dagster import DagsterEventType, Field, Float, StringSource

from valohai_dagster.embedded.conductor import keep_alive
from valohai_dagster.errors import ValohaiError
from valohai_dagster.plugin.compat import (
    CapturedLogContext,
    CapturedLogData,
    CapturedLogMetadata,
    CapturedLogSubscription,
    ComputeIOType,
    ConfigurableClassData,
    LocalComputeLogManager,
    finish_subscription,
    tagged_ops,
)
from valohai_dagster.plugin.log_sections import Position, Stream, read_sections, stream_from
from valohai_dagster.plugin.log_source import LogIndex, ServiceLogs
from valohai_dagster.plugin.step_tag import STEP_TAG

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # how often an open log view looks for more
_EXTENSIONS: Mapping[str, Stream] = {"out": "stdout", "err": "stderr"}
_current: dict[str, tuple[str, ...]] = {}


def current_log_key(run_id: str) -> tuple[str, ...] | None:
    """The log key that this process captures for a run, None when another log manager is in use."""
    return _current.get(run_id)


class ValohaiComputeLogManager(LocalComputeLogManager):
    """Serves executions' logs, and Dagster's local capture for the rest.

    `base_dir` is where Dagster's own captures go, by default `compute_logs` in the state directory. `settings_file`
    names the valohai.toml to use; without it the usual search applies.
    """

    def __init__(
        self,
        base_dir: str | None = None,
        polling_timeout: float | None = None,
        settings_file: str | None = None,
        inst_data: ConfigurableClassData | None = None,
        logs: ServiceLogs | None = None,
    ) -> None:
        self._settings_file = settings_file
        base_dir = base_dir or str(self._settings().state_dir / "compute_logs")
        keep_alive(
            self._settings()
        )  # pictures and links of the UI need the conductor, not only runs
        super().__init__(base_dir, polling_timeout, inst_data)
        self._local = LocalComputeLogManager(base_dir, polling_timeout)
        self._logs = logs or ServiceLogs(self._settings)
        self._watcher = _Watcher(self)
        self._complained = False
        self._foreign: dict[tuple[str, ...], frozenset[str]] = {}

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {
            "base_dir": Field(StringSource, is_required=False),
            "polling_timeout": Field(Float, is_required=False),
            "settings_file": Field(StringSource, is_required=False),
        }

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> ValohaiComputeLogManager:
        return cls(inst_data=inst_data, **config_value)

    def _settings(self) -> Any:
        from valohai_dagster.settings import load_settings

        return load_settings(Path(self._settings_file) if self._settings_file else None)

    # -- capture, in the process that runs the step ----------------------------------------------------------------
    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Generator[CapturedLogContext, None, None]:
        run_id = log_key[0] if log_key else ""
        _current[run_id] = tuple(log_key)
        try:
            with self._local.capture_logs(log_key) as context:
                yield context
        finally:
            _current.pop(run_id, None)

    @contextmanager
    def open_log_stream(
        self, log_key: Sequence[str], io_type: ComputeIOType
    ) -> Generator[Any, None, None]:
        with self._local.open_log_stream(log_key, io_type) as stream:
            yield stream

    # -- reading ---------------------------------------------------------------------------------------------------
    def index(self, log_key: Sequence[str]) -> LogIndex:
        """Our sections behind a key; empty for keys of others and when the records cannot be read."""
        if len(log_key) != 3 or log_key[1] != "compute_logs":
            return LogIndex()
        try:
            return self._logs.index(log_key)
        except (ValohaiError, OSError) as error:
            if not self._complained:
                text = "logs of executions cannot be shown: %s"
                log.warning(text, error, extra={"action": "outage", "step": "logs"})
                self._complained = True
            return LogIndex()

    def get_log_data(
        self, log_key: Sequence[str], cursor: str | None = None, max_bytes: int | None = None
    ) -> CapturedLogData:
        index = self.index(log_key)
        at = Position.parse(cursor)
        if not index.sections:
            return self._local.get_log_data(log_key, at.local, max_bytes)
        chunk = read_sections(index.sections, cursor, self._logs, max_bytes)
        stdout, stderr, at = chunk.stdout, chunk.stderr, chunk.position
        if self._shared(log_key, index):
            local = self._local.get_log_data(log_key, at.local, max_bytes)
            stdout, stderr = (local.stdout or b"") + stdout, (local.stderr or b"") + stderr
            at = replace(at, local=local.cursor)
        return CapturedLogData(
            log_key=log_key, stdout=stdout or None, stderr=stderr or None, cursor=str(at)
        )

    def _shared(self, log_key: Sequence[str], index: LogIndex) -> bool:
        """Whether the process that captured also runs steps that are not ours, whose prints must show as well."""
        key = tuple(log_key)
        if key not in self._foreign:
            if not self.has_instance:
                return False
            self._foreign[key] = foreign_steps(self._instance, key)
        return bool(self._foreign[key] - index.step_keys)

    def get_log_data_for_type(
        self,
        log_key: Sequence[str],
        io_type: ComputeIOType,
        offset: int | None = 0,
        max_bytes: int | None = None,
    ) -> Any:
        """One stream as a single file; used by Dagster for tick logs and downloads, not by the log view."""
        if not self.index(log_key).sections:
            return self._local.get_log_data_for_type(log_key, io_type, offset or 0, max_bytes)
        start = offset or 0
        data = bytearray()
        stream: Stream = "stdout" if io_type == ComputeIOType.STDOUT else "stderr"
        for piece in stream_from(self.index(log_key).sections, stream, self._logs, start):
            data += piece
            if max_bytes is not None and len(data) >= max_bytes:
                del data[max_bytes:]
                break
        return bytes(data), start + len(data)

    def is_capture_complete(self, log_key: Sequence[str]) -> bool:
        """Whether no more can come: the process that followed has ended, and so have its executions."""
        return self.index(log_key).final and (
            self._local.is_capture_complete(log_key) or self._run_ended(log_key)
        )

    def _run_ended(self, log_key: Sequence[str]) -> bool:
        """A process that was killed leaves no mark, but its run ends."""
        if not self.has_instance or len(log_key) != 3:
            return False
        run = self._instance.get_run_by_id(log_key[0])
        return run is not None and run.is_finished

    def get_log_metadata(self, log_key: Sequence[str]) -> CapturedLogMetadata:
        index = self.index(log_key)
        local = self._local.get_log_metadata(log_key)
        if not index.sections:
            return local
        return local._replace(
            stdout_location=self._location(index, "stdout"),
            stderr_location=self._location(index, "stderr"),
        )

    def _location(self, index: LogIndex, stream: Stream) -> str:
        stored = [s.stored[stream] for s in index.sections if stream in s.stored]
        return ", ".join(f"{entry.store}: {entry.key}" for entry in stored) or "live, in Redis"

    def get_captured_local_path(
        self, log_key: Sequence[str], extension: str, partial: bool = False
    ) -> str:
        """The file that the webserver sends as download: for our executions, put together now."""
        if partial or extension not in _EXTENSIONS or not self.index(log_key).sections:
            return self._local.get_captured_local_path(log_key, extension, partial)
        name = hashlib.sha256("/".join(log_key).encode()).hexdigest()[:32]
        path = Path(self._base_dir).resolve() / "downloads" / f"{name}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pieces = stream_from(self.index(log_key).sections, _EXTENSIONS[extension], self._logs)
        with path.open("wb") as file:
            file.writelines(pieces)
        return str(path)

    def delete_logs(
        self, log_key: Sequence[str] | None = None, prefix: Sequence[str] | None = None
    ) -> None:
        """Deletes local captures only; executions' logs belong to the records and their retention."""
        self._local.delete_logs(log_key, prefix)

    # -- open views ------------------------------------------------------------------------------------------------
    def subscribe(
        self, log_key: Sequence[str], cursor: str | None = None
    ) -> CapturedLogSubscription:
        subscription = CapturedLogSubscription(self, log_key, cursor)
        self._watcher.add(subscription)
        return subscription

    def unsubscribe(self, subscription: CapturedLogSubscription) -> None:
        self._watcher.remove(subscription)

    def dispose(self) -> None:
        self._watcher.stop()
        self._local.dispose()
        super().dispose()


def foreign_steps(instance: Any, log_key: Sequence[str]) -> frozenset[str]:
    """Steps of the process behind a log key that are not steps of ours."""
    run = instance.get_run_by_id(log_key[0])
    records = instance.get_records_for_run(
        log_key[0], of_type=DagsterEventType.LOGS_CAPTURED
    ).records
    for record in records:
        data = record.event_log_entry.dagster_event.event_specific_data
        if data.file_key == log_key[-1]:
            return frozenset(data.step_keys or ()) - tagged_ops(instance, run, STEP_TAG)
    return frozenset()


class _Watcher:
    """One thread that feeds all open log views of this process, and ends when none is left."""

    def __init__(self, manager: ValohaiComputeLogManager, seconds: float = POLL_SECONDS) -> None:
        self._manager = manager
        self._seconds = seconds
        self._lock = threading.Lock()
        self._open: list[CapturedLogSubscription] = []
        self._thread: threading.Thread | None = None

    def add(self, subscription: CapturedLogSubscription) -> None:
        with self._lock:
            self._open.append(subscription)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="valohai-logs", daemon=True)
                self._thread.start()

    def remove(self, subscription: CapturedLogSubscription) -> None:
        self._forget(subscription)
        subscription.complete()

    def _forget(self, subscription: CapturedLogSubscription) -> None:
        with self._lock:
            if subscription in self._open:
                self._open.remove(subscription)

    def stop(self) -> None:
        with self._lock:
            self._open.clear()

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds)
            with self._lock:
                current = list(self._open)
                if not current:
                    self._thread = None
                    return
            for subscription in current:
                self._feed(subscription)

    def _feed(self, subscription: CapturedLogSubscription) -> None:
        try:
            complete = self._manager.is_capture_complete(subscription.log_key)
            subscription.fetch()  # after the question, so that what came before the end is in it
            if complete:
                self._forget(subscription)
                finish_subscription(subscription)
        except Exception:
            key = "/".join(subscription.log_key)
            log.exception("log view of %s failed; trying again", key, extra={"action": "log-view"})
