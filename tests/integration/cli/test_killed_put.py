"""`data put` that is killed (SIGKILL) in mid-upload leaves nothing in the store for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from tests.support.faulty_proxy import Asked, Fault, FaultyProxy, faulty_proxy
from tests.support.servers.s3_stores import PART_BYTES, s3_client, s3_store
from valohai_dagster.cli import data, stores
from valohai_dagster.data import datums, own_uploads
from valohai_dagster.data.transfers import Mover
from valohai_dagster.errors import RefusedError, StoreConflict
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import load_settings
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import open_stores

RUNNER = CliRunner()


@pytest.fixture
def proxy(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of the default store, a bucket."""
    with faulty_proxy(moto_server) as proxy:
        section = {
            "kind": "s3",
            "endpoint_url": proxy.url,
            "region": "us-east-1",
            "bucket": s3_store(moto_server).place,
            "access_key_id": "testing",
            "secret_access_key": "testing",
            "part_bytes": PART_BYTES,
        }
        monkeypatch.setenv("VALOHAI_STORES", json.dumps({"main": section}))
        monkeypatch.setenv("VALOHAI_DEFAULT_STORE", "main")
        monkeypatch.setenv("VALOHAI_SWEEP_AFTER_SECONDS", "0")
        yield proxy


@pytest.fixture
def records(proxy: FaultyProxy) -> Iterator[Records]:
    with closing(open_records(load_settings())) as records:
        yield records


@pytest.fixture
def bucket(proxy: FaultyProxy) -> Store:
    return open_stores(load_settings())["main"]


def run(app: Any, *arguments: str) -> Any:
    result = RUNNER.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def put_and_kill(proxy: FaultyProxy, *arguments: Path | str) -> None:
    """Once the store has stopped reading what it sends."""
    command = [sys.executable, "-m", "valohai_dagster", "data", "put", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert proxy.silent.wait(60)
        finally:
            process.kill()
        output, errors = process.communicate()
    assert output == b"", errors


def later(records: Records) -> None:
    """As if nobody had been heard of for two hours."""
    past = datetime.now(timezone.utc) - timedelta(hours=1)
    with records.write() as conn:
        conn.execute(t.uploads.update().values(expires_at=past))


def rows(records: Records) -> list[Any]:
    with records.read() as conn:
        return list(conn.execute(sa.select(t.uploads)))


def unfinished(moto_server: str, bucket: Store) -> list[Any]:
    with closing(s3_client(moto_server)) as client:
        return client.list_multipart_uploads(Bucket=bucket.uri("").split("/")[2]).get("Uploads", [])


def test_parts_of_a_killed_put_are_aborted_and_what_is_stored_whole_stays(
    proxy: FaultyProxy, records: Records, bucket: Store, moto_server: str, tmp_path: Path
) -> None:
    good, large = tmp_path / "good", tmp_path / "large"
    good.write_bytes(b"12345")
    large.write_bytes(os.urandom(3 * PART_BYTES))
    (kept,) = run(data.app, "put", str(good), "--json")

    def second_part(asked: Asked) -> Fault | None:
        return Fault(silent_after=PART_BYTES // 2) if asked.part == 2 else None

    proxy.rule = second_part
    put_and_kill(proxy, large)
    proxy.rule = lambda asked: None
    (noted,) = rows(records)
    assert (noted.kind, noted.name, noted.parts is not None) == ("datum", "large", True)
    assert [upload["Key"] for upload in unfinished(moto_server, bucket)] == [noted.key]
    assert (
        run(stores.app, "sweep", "--json")["uploads"] == []
    )  # it may go on, as far as anybody knows
    later(records)
    (shown,) = run(stores.app, "sweep", "--dry-run", "--json")["uploads"]
    assert (shown["key"], shown["execution"], shown["removed"]) == (noted.key, None, False)
    assert len(unfinished(moto_server, bucket)) == 1
    (swept,) = run(stores.app, "sweep", "--json")["uploads"]
    assert (swept["key"], swept["removed"], swept["problem"]) == (noted.key, True, None)
    assert (unfinished(moto_server, bucket), rows(records)) == ([], [])
    assert [item.key.split("/")[-2] for item in bucket.list()] == [kept["id"]]


def test_a_put_that_is_killed_before_its_record_leaves_no_object(
    proxy: FaultyProxy, records: Records, bucket: Store, tmp_path: Path
) -> None:
    """The object is whole, only the answer did not come through."""
    (tmp_path / "small").write_bytes(b"12345")

    def swallow(asked: Asked) -> Fault | None:
        return Fault(silent_after=4) if asked.method == "PUT" else None

    proxy.rule = swallow
    put_and_kill(proxy, tmp_path / "small")
    (noted,) = rows(records)
    bucket.put(noted.key, b"12345")  # the rest of it, which the proxy has held back
    later(records)
    run(stores.app, "sweep", "--json")
    assert (list(bucket.list()), rows(records)) == ([], [])


def test_a_put_that_gets_no_answer_to_its_commit_keeps_what_was_recorded(
    records: Records, bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database has the record, only its answer is lost, as when it is restarted at that moment."""
    (tmp_path / "small").write_bytes(b"12345")
    recorded: list[Any] = []
    write, create = Records.write, datums.create_datum

    def noted(conn: sa.Connection, datum: Any) -> None:
        create(conn, datum)
        recorded.append(datum)

    @contextmanager
    def without_answer(self: Records) -> Iterator[sa.Connection]:
        known = len(recorded)
        with write(self) as conn:
            yield conn
        if len(recorded) > known:
            raise ConnectionError("the server closed the connection")

    with monkeypatch.context() as patch:
        patch.setattr(datums, "create_datum", noted)
        patch.setattr(Records, "write", without_answer)
        with pytest.raises(ConnectionError):
            run(data.app, "put", str(tmp_path / "small"), "--json")
    later(records)
    run(stores.app, "sweep", "--json")
    (known,) = run(data.app, "ls", "--json")
    assert (known["id"], rows(records)) == (recorded[0].id, [])
    assert bucket.stat(recorded[0].key) is not None


def test_an_upload_in_parts_that_was_begun_and_not_noted_is_aborted(
    proxy: FaultyProxy, records: Records, bucket: Store, moto_server: str
) -> None:
    """Killed between the store's answer and the note: the records know the key only."""
    key = "data/uploads/7b0f1f76-5f0c-4f6e-9b53-0b8f1c2d3e4f/w"
    noted_now(records, key, "7b0f1f76-5f0c-4f6e-9b53-0b8f1c2d3e4f")
    for same in (key, key + "2"):
        assert bucket.begin_parts(same, size=3 * PART_BYTES) is not None
    later(records)
    run(stores.app, "sweep", "--json")
    left = [upload["Key"] for upload in unfinished(moto_server, bucket)]
    assert left == [key + "2"]  # which nobody has given up


def noted_now(records: Records, key: str, upload_id: str) -> own_uploads.Noted:
    return own_uploads.Noted(
        records,
        upload_id=upload_id,
        name="w",
        store="main",
        key=key,
        clock=lambda: datetime.now(timezone.utc),
        seal=lambda parts, size: b"",
    )


def test_what_is_being_removed_is_not_recorded_any_more(
    proxy: FaultyProxy, records: Records, bucket: Store, tmp_path: Path, monkeypatch: Any
) -> None:
    """A process that slept too long (a laptop that was shut) finds its upload swept, and says so."""
    (tmp_path / "slow").write_bytes(b"12345")
    create = own_uploads.settle_datum

    def asleep(conn: sa.Connection, datum: Any) -> None:
        conn.execute(t.uploads.update().values(given_up=True))
        create(conn, datum)

    monkeypatch.setattr(own_uploads, "settle_datum", asleep)
    with pytest.raises(RefusedError, match="upload it again"):
        run(data.app, "put", str(tmp_path / "slow"), "--json")
    assert run(data.app, "ls", "--json") == []


def test_what_lies_under_the_key_already_is_not_ours_to_remove(
    records: Records, bucket: Store, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    bucket.put("data/uploads/x/w", b"of somebody else")
    noted = noted_now(records, "data/uploads/x/w", "x")
    with Mover() as mover, pytest.raises(StoreConflict):
        mover.send(tmp_path / "file", bucket, "data/uploads/x/w", name="w", noted=noted)
    assert rows(records) == []
    assert bucket.stat("data/uploads/x/w") is not None


def test_an_upload_that_goes_on_is_put_off(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = noted_now(records, "data/uploads/x/w", "x")
    later(records)
    noted.goes_on()  # it has said so a moment ago
    now = datetime.now(timezone.utc)
    with records.read() as conn:
        assert len(own_uploads.overdue(conn, before=now)) == 1
    monkeypatch.setattr(own_uploads, "PROLONG_SECONDS", 0.0)
    noted.goes_on()
    with records.write() as conn:
        assert own_uploads.give_up(conn, before=now) == []
