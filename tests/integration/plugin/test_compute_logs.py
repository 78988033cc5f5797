"""The log manager on real records, a real Redis and a local store."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import redis
from pydantic import SecretStr

from tests.support.servers.s3_stores import s3_store
from valohai_agent.protocol import Keys, LogLine, LogStream
from valohai_dagster.plugin.compat import ComputeIOType
from valohai_dagster.plugin.compute_logs import ValohaiComputeLogManager, current_log_key
from valohai_dagster.plugin.log_source import ServiceLogs
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_stores import S3StoreSettings
from valohai_dagster.stores.registry import open_stores

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
KEY = ["run1", "compute_logs", "abcdefgh"]


class Platform:
    """Writes what the service and agents would."""

    def __init__(self, settings: Settings, records: Records, client: redis.Redis) -> None:
        self.settings, self.records, self.client = settings, records, client
        self.keys = Keys(records.deployment_id)

    def execution(self, name: str = "e1", *, counter: int = 1, status: str = "started") -> None:
        with self.records.write() as conn:
            if counter == 1:
                conn.execute(
                    t.projects.insert().values(id="p", name="digits", counter=1, ctime=NOW)
                )
            conn.execute(
                t.executions.insert().values(
                    id=name,
                    project_id="p",
                    counter=counter,
                    step="train",
                    commit="c",
                    run_id="run1",
                    step_key="digits__train",
                    log_key="/".join(KEY),
                    group_name="local",
                    image="i",
                    spec={},
                    status=status,
                    ctime=NOW,
                )
            )

    def attempt(self, number: int = 1, *, execution: str = "e1") -> None:
        with self.records.write() as conn:
            conn.execute(t.attempts.insert().values(execution_id=execution, number=number, logs={}))

    def end(
        self, number: int = 1, *, end: str = "finished", status: str = "complete", **logs: bytes
    ) -> None:
        store = open_stores(self.settings).log
        stored = {}
        for stream, data in logs.items():
            key = f"logs/e1/{number}/{stream}"
            store.put(key, data)
            stored[stream] = {"store": store.name, "key": key, "size": len(data), "lines": 1}
        with self.records.write() as conn:
            mine = (t.attempts.c.execution_id == "e1") & (t.attempts.c.number == number)
            conn.execute(t.attempts.update().where(mine).values(ended_at=NOW, end=end, logs=stored))
            conn.execute(
                t.executions.update().where(t.executions.c.id == "e1").values(status=status)
            )

    def line(
        self,
        text: str,
        start: int,
        *,
        attempt: int = 1,
        stream: LogStream = LogStream.stdout,
        gap: int = 0,
    ) -> int:
        extra = len(b"[valohai] ") if stream is LogStream.status else 0
        end = start + len(text.encode()) + 1 + extra
        entry = LogLine(s=stream, t="x", m=text, o=start, e=end, g=gap)
        fields: Any = entry.model_dump(mode="json")
        self.client.xadd(self.keys.log("local", "e1", attempt), fields)
        return end


@pytest.fixture
def platform(settings: Settings, redis_client: redis.Redis) -> Iterator[Platform]:
    records = open_records(settings)
    yield Platform(settings, records, redis_client)
    records.close()


@pytest.fixture
def manager(settings: Settings, tmp_path: Path) -> Iterator[ValohaiComputeLogManager]:
    logs = ServiceLogs(lambda: settings)
    found = ValohaiComputeLogManager(str(tmp_path / "captures"), logs=logs)
    yield found
    found.dispose()
    logs.records().close()
    if logs._redis is not None:
        logs._redis.close()


def test_live_lines_then_the_stored_file_without_loss_or_repetition(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    offset = platform.line("one", 0)
    platform.line("pulling", 0, stream=LogStream.status)
    first = manager.get_log_data(KEY, None, 1 << 20)
    assert (first.stdout, first.stderr) == (b"one\n", b"[valohai] pulling\n")
    platform.line("two", offset)
    second = manager.get_log_data(KEY, first.cursor, 1 << 20)
    assert (second.stdout, second.stderr) == (b"two\n", None)
    platform.end(
        stdout=b"one\ntwo\nlast without newline", stderr=b"[valohai] pulling\n[valohai] done\n"
    )
    third = manager.get_log_data(KEY, second.cursor, 1 << 20)
    assert (third.stdout, third.stderr) == (b"last without newline", b"[valohai] done\n")
    assert manager.get_log_data(KEY, third.cursor, 1 << 20).stdout is None
    whole = manager.get_log_data(KEY, None, 1 << 20)
    assert whole.stdout == b"one\ntwo\nlast without newline"


def test_m02_gap_markers_are_shown_live_and_the_stored_log_is_complete(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    platform.line("a", 0)
    marker = LogLine(
        s=LogStream.stdout, t="x", m="... 3 lines are only in the stored log ...", o=2, e=8, g=3
    )
    fields: Any = marker.model_dump(mode="json")
    platform.client.xadd(platform.keys.log("local", "e1", 1), fields)
    platform.line("e", 8)
    data = manager.get_log_data(KEY, None, None)
    assert data.stdout == b"a\n... 3 lines are only in the stored log ...\ne\n"
    platform.end(stdout=b"a\nb\nc\nd\ne\nf\n")
    assert manager.get_log_data(KEY, data.cursor, None).stdout == b"f\n"
    assert manager.get_log_data(KEY, None, None).stdout == b"a\nb\nc\nd\ne\nf\n"


def test_a_lost_attempts_log_stays_and_the_second_attempt_follows(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt(1)
    platform.line("first", 0)
    seen = manager.get_log_data(KEY, None, None)
    platform.end(1, end="lost", status="queued")
    platform.attempt(2)
    platform.line("second", 0, attempt=2)
    data = manager.get_log_data(KEY, seen.cursor, None)
    assert data.stdout == b"[valohai] ---- train: execution #1, attempt 2 ----\nsecond\n"
    whole = manager.get_log_data(KEY, None, None).stdout or b""
    assert whole.startswith(b"first\n[valohai] ----")


def test_100_000_lines_come_in_full_chunks_and_complete(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    text = b"".join(b"line %d of a hundred thousand\n" % n for n in range(100_000))
    platform.end(stdout=text)
    received: list[bytes] = []
    subscription = manager.subscribe(KEY)
    subscription(lambda data: received.append(data.stdout or b""))
    subscription.dispose()
    assert b"".join(received) == text
    assert max(map(len, received)) < 1 << 21


def test_an_open_view_is_fed_and_ends_with_the_execution(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    with manager.capture_logs(KEY):
        assert current_log_key("run1") == tuple(KEY)
    assert current_log_key("run1") is None
    received: list[bytes] = []
    subscription = manager.subscribe(KEY)
    subscription(lambda data: received.append(data.stdout or b""))
    assert not subscription.is_complete
    platform.line("later", 0)
    _until(lambda: b"later\n" in received)
    platform.end(stdout=b"later\nlast")
    _until(lambda: subscription.is_complete)
    assert b"".join(received) == b"later\nlast"


def _until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_an_emptied_redis_leaves_the_view_standing(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    platform.line("one", 0)
    data = manager.get_log_data(KEY, None, None)
    platform.client.flushall()
    assert manager.get_log_data(KEY, data.cursor, None).stdout is None
    platform.line("two", 4)
    assert manager.get_log_data(KEY, data.cursor, None).stdout == b"two\n"


def test_a_late_view_says_what_the_live_log_no_longer_has(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    platform.line("late", 500)
    data = manager.get_log_data(KEY, None, None)
    assert (
        data.stdout == b"[valohai] ... 500 bytes are shown when the execution has ended ...\nlate\n"
    )


def test_keys_that_are_not_ours_are_captured_locally(manager: ValohaiComputeLogManager) -> None:
    key = ["run2", "compute_logs", "other"]
    with manager.capture_logs(key):
        sys.stdout.flush()
    assert manager.is_capture_complete(key)
    with manager.open_log_stream(["repo", "sensor", "1"], _stderr()) as stream:
        stream.write("tick\n")
    assert manager.get_log_data(["repo", "sensor", "1"]).stderr == b"tick\n"


def _stderr() -> Any:
    from valohai_dagster.plugin.compat import ComputeIOType

    return ComputeIOType.STDERR


def test_the_download_is_the_whole_log(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    platform.end(stdout=b"all of it\n", stderr=b"x\n")
    assert Path(manager.get_captured_local_path(KEY, "out")).read_bytes() == b"all of it\n"
    metadata = manager.get_log_metadata(KEY)
    assert metadata.stdout_download_url == "/logs/run1/compute_logs/abcdefgh/out"
    assert "logs/e1/1/stdout" in str(metadata.stdout_location)


def test_prints_of_other_steps_in_the_same_process_show_too(
    settings: Settings, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """An in-process run has one capture for all its steps."""
    overrides = {
        "compute_logs": {
            "module": "valohai_dagster.plugin.compute_logs",
            "class": "ValohaiComputeLogManager",
            "config": {"base_dir": str(tmp_path / "captures")},
        }
    }

    @dg.asset
    def native() -> None:
        print("from a Python asset")

    with dg.instance_for_test(overrides=overrides) as instance:
        manager: Any = instance.compute_log_manager
        assert isinstance(manager, ValohaiComputeLogManager)
        manager._logs = ServiceLogs(lambda: settings)
        result = dg.materialize([native], instance=instance)
        records = instance.get_records_for_run(
            result.run_id, of_type=dg.DagsterEventType.LOGS_CAPTURED
        ).records
        event = records[0].event_log_entry.dagster_event
        assert event is not None
        data: Any = event.event_specific_data
        key = [result.run_id, "compute_logs", data.file_key]
        records_db = open_records(settings)
        platform = Platform(settings, records_db, redis_client)
        KEY[:], saved = key, list(KEY)
        try:
            platform.execution()
            platform.attempt()
            platform.end(stdout=b"from an execution\n")
            shown = manager.get_log_data(key).stdout
        finally:
            KEY[:] = saved
            records_db.close()
            manager._logs.records().close()
    assert shown is not None
    assert b"from an execution\n" in shown


@pytest.mark.stores
def test_a_log_in_a_remote_store_is_read_from_any_place_and_downloaded(
    platform: Platform, moto_server: str, tmp_path: Path
) -> None:
    """Streams of remote stores cannot seek: each read begins at its offset."""
    remote = s3_store(moto_server)
    section = S3StoreSettings(
        kind="s3",
        bucket=remote.uri("x").split("/")[2],
        endpoint_url=moto_server,
        region="us-east-1",
        access_key_id="testing",
        secret_access_key=SecretStr("testing"),
    )
    stores = {**platform.settings.stores, "cloud": section}
    settings = platform.settings.model_copy(update={"stores": stores, "log_store": "cloud"})
    platform.settings = settings
    platform.execution()
    platform.attempt()
    text = "".join(f"line {n} äöü€\n" for n in range(40_000)).encode()
    platform.end(stdout=text)
    logs = ServiceLogs(lambda: settings)
    manager = ValohaiComputeLogManager(str(tmp_path / "captures"), logs=logs)
    seen, cursor = b"", None
    while (data := manager.get_log_data(KEY, cursor, 200_000)).stdout:
        seen, cursor = seen + data.stdout, data.cursor
    assert seen == text
    part, end = manager.get_log_data_for_type(KEY, ComputeIOType.STDOUT, 500_000, 100)
    assert (part, end) == (text[500_000:500_100], 500_100)
    assert Path(manager.get_captured_local_path(KEY, "out")).read_bytes() == text
    manager.dispose()
    logs.records().close()


def test_a_log_that_retention_took_says_so(
    platform: Platform, manager: ValohaiComputeLogManager
) -> None:
    platform.execution()
    platform.attempt()
    platform.end(stdout=b"gone\n")
    gone = {"stdout": {"size": 5, "removed_at": "2026-02-03T00:00:00+00:00"}}
    with platform.records.write() as conn:
        conn.execute(t.attempts.update().values(logs=gone))
    data = manager.get_log_data(KEY, None, None)
    assert data.stdout == b"[valohai] this log was removed by retention on 2026-02-03\n"
    assert manager.get_log_data(KEY, data.cursor, None).stdout is None
