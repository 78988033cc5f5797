"""Uploads that nobody reported leave nothing in the stores; what was reported is never touched."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from tests.support.ports import free_port, wait_for
from tests.support.redis_server import RedisServer
from tests.support.servers.s3_stores import PART_BYTES, s3_client, s3_store
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.executions import sweeping, uploads
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.settings_stores import S3StoreSettings
from valohai_dagster.stores.registry import open_stores

LATER = timedelta(days=2)  # all URLs have run out by then
_NUMBERS = itertools.count(1)  # of agents


def bucket_on(endpoint: str, **values: Any) -> S3StoreSettings:
    return S3StoreSettings(
        **{
            "kind": "s3",
            "endpoint_url": endpoint,
            "region": "us-east-1",
            "access_key_id": "testing",
            "secret_access_key": SecretStr("testing"),
            "part_bytes": PART_BYTES,
            **values,
        }
    )


@pytest.fixture
def remote(settings: Settings, moto_server: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """With a store `s3`; conductors sweep only when the test says so."""
    monkeypatch.setattr(sweeping, "SWEEP_SECONDS", 3600.0)
    bucket = bucket_on(moto_server, bucket=s3_store(moto_server).place)
    return static_settings(settings, stores={**settings.stores, "s3": bucket})


@pytest.fixture
def service(remote: Settings) -> Iterator[RunningService]:
    with running_service(remote) as service:
        yield service


def lease_of(service: RunningService, redis_server: RedisServer, store: str = "s3") -> SimLease:
    service.client.submit(make_spec(upload_store=store))
    lease = service.agent(redis_server, name=f"sim-{next(_NUMBERS)}").take()
    lease.leased()
    lease.wait_grants()
    return lease


def granted(lease: SimLease, name: str, size: int = 5) -> p.UploadGrant:
    request = p.GrantRequest(id=f"want-{name}", kind="output", name=name, size=size)
    answer = lease.want(request)
    assert request.id in answer.uploads, answer.refused
    return answer.uploads[request.id]


def send(grant: p.UploadGrant, content: bytes) -> None:
    """As an agent uploads a file whole."""
    if grant.transfer.url.startswith("file:"):
        path = Path(unquote(urlsplit(grant.transfer.url).path))
        path.write_bytes(content)
    else:
        answer = httpx.put(grant.transfer.url, headers=grant.transfer.headers, content=content)
        answer.raise_for_status()


def reported(lease: SimLease, grant: p.UploadGrant, name: str) -> None:
    upload = {"upload_id": grant.upload_id, "name": name, "size": 5}
    lease.report(p.OutputStored(**upload, checksums=p.Checksums()))


def sweep(service: RunningService, *, later: timedelta = LATER) -> None:
    """One look as of that much later."""

    async def look(running: ExecutionService) -> None:
        now = running.clock()
        running.sweeper.clock = lambda: now + later
        while await running.sweeper.sweep():
            pass

    service.call(look)


def keys(service: RunningService, store: str = "s3") -> set[str]:
    return {found.key for found in open_stores(service.settings)[store].list("")}


def rows(service: RunningService) -> dict[str, Any]:
    """Granted uploads by name."""
    with service.records.read() as conn:
        return {row.name: row for row in conn.execute(sa.select(t.grants))}


def test_o02_what_was_uploaded_and_not_reported_is_removed_once_its_attempt_is_over(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server)
    kept, lost = granted(lease, "kept"), granted(lease, "lost")
    send(kept, b"12345")
    send(lost, b"54321")
    reported(lease, kept, "kept")
    service.events(lease.job.execution_id, lambda event: event.message == "stored output kept")
    sweep(service)  # the attempt goes on: its URLs may have been renewed
    assert len(keys(service)) == 2
    lease.finish()
    service.final(lease.job.execution_id)
    sweep(service, later=timedelta(0))  # the URLs are good still
    assert len(keys(service)) == 2
    sweep(service)
    found = rows(service)
    assert keys(service) == {found["kept"].key}
    assert found["lost"].swept_at is not None
    assert found["kept"].swept_at is None


def test_an_upload_in_parts_that_was_begun_is_aborted(
    service: RunningService, redis_server: RedisServer, moto_server: str
):
    lease = lease_of(service, redis_server)
    grant = granted(lease, "big", 3 * PART_BYTES)
    assert grant.parts is not None
    first = grant.parts.parts[1]
    httpx.put(first.url, headers=first.headers, content=bytes(PART_BYTES)).raise_for_status()
    lease.finish()
    service.final(lease.job.execution_id)
    bucket = service.settings.stores["s3"].bucket  # type: ignore[union-attr]
    with closing(s3_client(moto_server)) as client:
        assert len(client.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1
        sweep(service)
        assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
    assert rows(service)["big"].swept_at is not None


def test_an_upload_in_parts_that_a_killed_conductor_had_begun_is_aborted_too(
    service: RunningService, redis_server: RedisServer, moto_server: str
):
    """It was killed between the store's answer and the note of it, so the records have the key only."""
    lease = lease_of(service, redis_server)
    granted(lease, "big", 3 * PART_BYTES)
    key = rows(service)["big"].key
    bucket = open_stores(service.settings)["s3"]
    assert bucket.begin_parts(key, size=3 * PART_BYTES) is not None
    with service.records.write() as conn:
        conn.execute(t.grants.update().values(parts=None))
    lease.finish()
    service.final(lease.job.execution_id)
    with closing(s3_client(moto_server)) as client:
        name = service.settings.stores["s3"].bucket  # type: ignore[union-attr]
        assert len(client.list_multipart_uploads(Bucket=name)["Uploads"]) == 2
        sweep(service)
        assert "Uploads" not in client.list_multipart_uploads(Bucket=name)
    assert rows(service)["big"].swept_at is not None


def test_the_key_of_a_fenced_agents_late_upload_is_removed(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server)
    late = granted(lease, "late")

    async def lose(running: ExecutionService) -> None:
        active = running.memory.active[lease.job.execution_id]
        await running._losses.requeue(active, "the test says so")

    service.call(lose)
    send(late, b"12345")
    reported(lease, late, "late")
    second = service.agent(redis_server, name="second").take()
    second.leased()
    second.wait_grants()
    kept = granted(second, "kept")
    send(kept, b"12345")
    reported(second, kept, "kept")
    second.finish()
    view = service.final(lease.job.execution_id).data
    assert [output["name"] for output in view["outputs"]] == ["kept"]
    sweep(service)
    assert keys(service) == {rows(service)["kept"].key}


def test_a_local_store_keeps_no_half_written_file(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server, store="local")
    grant = granted(lease, "half")
    directory = Path(unquote(urlsplit(grant.transfer.url).path)).parent
    (directory / f".{'0' * 32}.part").write_bytes(b"ha")  # as a killed agent leaves it
    lease.finish()
    service.final(lease.job.execution_id)
    sweep(service)
    assert not directory.exists()


def test_a_crash_between_removing_and_noting_it_changes_nothing(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server)
    send(granted(lease, "lost"), b"12345")
    granted(lease, "never uploaded")
    lease.finish()
    service.final(lease.job.execution_id)
    with service.records.read() as conn:
        before = rows(service)["lost"].expires_at + LATER
        found = uploads.leftovers(conn, before=before, limit=10)
    key, stores = load_secret_key(service.settings), open_stores(service.settings)
    assert len(sweeping.remove_leftovers(found, stores, key).removed) == 2
    service.kill()
    service.start()
    wait_for(lambda: len(service.held) == service.records.shards, what="the shards")
    sweep(service)
    assert all(row.swept_at is not None for row in rows(service).values())


def test_a_store_that_is_away_is_left_alone_for_a_while_and_the_others_are_swept(
    remote: Settings, redis_server: RedisServer
):
    away = bucket_on(f"http://127.0.0.1:{free_port()}", bucket="nowhere", connect_timeout_seconds=1)
    with running_service(
        static_settings(remote, stores={**remote.stores, "away": away})
    ) as service:
        one, other = lease_of(service, redis_server, "away"), lease_of(service, redis_server)
        granted(one, "stays")
        send(granted(other, "goes"), b"12345")
        for lease in (one, other):
            lease.finish()
            service.final(lease.job.execution_id)
        sweep(service)
        assert keys(service) == set()
        assert rows(service)["stays"].swept_at is None
        assert service.service is not None
        tries = service.service.sweeper._rests["away"].length
        sweep(service)  # it rests, so it is not asked
        assert service.service.sweeper._rests["away"].length == tries
        sweep(service, later=LATER + tries * 2)
        assert service.service.sweeper._rests["away"].length == tries * 2


def test_many_are_swept_in_bounded_looks(
    service: RunningService, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweeping, "AT_ONCE", 3)
    lease = lease_of(service, redis_server)
    requests = [
        p.GrantRequest(id=str(n), kind="output", name=f"file-{n}", size=1) for n in range(10)
    ]
    lease.want(*requests)
    lease.finish()
    service.final(lease.job.execution_id)
    sweep(service)
    assert all(row.swept_at is not None for row in rows(service).values())


def test_nothing_that_was_accepted_is_ever_removed_however_reports_and_sweeps_meet(
    remote: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    """Two conductors sweep all the time, as of a time when every URL has run out, while agents report."""
    monkeypatch.setattr(sweeping, "SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(sweeping, "BUSY_SECONDS", 0.0)
    good: set[str] = set()
    with running_service(remote) as service, running_service(remote) as second:
        for one in (service, second):
            assert one.service is not None
            one.service.sweeper.clock = lambda now=one.service.clock: now() + LATER
            one.service.sweeper._threads.submit(lambda: None).result()
        for number in range(12):
            lease = lease_of(service, redis_server, "local" if number % 2 else "s3")
            names = [f"{number}-kept", f"{number}-live", f"{number}-lost"]
            grants = [granted(lease, name) for name in names]
            for grant in grants:
                send(grant, b"12345")
            for grant, name in zip(grants[:2], names[:2], strict=True):
                reported(lease, grant, name)
            log = lease.store_log("stdout", b"hello\n")
            lease.finish(logs=[log])
            good |= {*names[:2], "stdout"}
            service.final(lease.job.execution_id)

        def all_swept() -> bool:
            lost = [row for name, row in rows(service).items() if name.endswith("lost")]
            return all(row.swept_at is not None for row in lost)

        wait_for(all_swept, seconds=30, what="the sweep")
        with service.records.read() as conn:
            found = conn.execute(sa.select(t.grants)).all()
        there = {store: keys(service, store) for store in ("s3", "local")}
    for row in found:
        assert (row.key in there[row.store]) is row.accepted, row
        assert row.accepted is (row.name in good)
        assert (row.swept_at is None) is row.accepted
