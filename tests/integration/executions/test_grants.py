"""Grants as agents get them: uploads in parts, renewals, refusals, and stores that are slow or away."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.servers.s3_stores import PART_BYTES, s3_store
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.executions import minting, signing
from valohai_dagster.executions.spec_model import InputSpec
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import StaticGroupSettings
from valohai_dagster.settings_stores import LocalStoreSettings, S3StoreSettings
from valohai_dagster.stores.registry import open_stores

_NUMBERS = itertools.count(1)  # of agents


def bucket_on(endpoint: str, **values: Any) -> S3StoreSettings:
    made = s3_store(endpoint)
    return S3StoreSettings(
        kind="s3",
        bucket=made.place,
        endpoint_url=endpoint,
        region="us-east-1",
        access_key_id="testing",
        secret_access_key=SecretStr("testing"),
        part_bytes=PART_BYTES,
        **values,
    )


@pytest.fixture
def remote(settings: Settings, moto_server: str) -> Settings:
    stores = {**settings.stores, "s3": bucket_on(moto_server)}
    return static_settings(settings, stores=stores)


@pytest.fixture
def service(remote: Settings) -> Iterator[RunningService]:
    with running_service(remote) as service:
        yield service


def lease_of(service: RunningService, redis_server: RedisServer, **spec: Any) -> SimLease:
    service.client.submit(make_spec(**{"upload_store": "s3", **spec}))
    lease = service.agent(redis_server, name=f"sim-{next(_NUMBERS)}").take()
    lease.leased()
    lease.wait_grants()
    return lease


def wanted(name: str, size: int | None, kind: Any = "output") -> p.GrantRequest:
    return p.GrantRequest(id=f"want-{name}", kind=kind, name=name, size=size)


def more(upload_id: str, first: int, count: int) -> p.GrantRequest:
    return p.GrantRequest(id="more", kind="parts", name=upload_id, first=first, count=count)


def put_parts(parts: Mapping[int, p.Transfer], content: bytes, part_bytes: int) -> dict[int, str]:
    """Sends these parts; their ETags."""
    tags = {}
    for number, transfer in parts.items():
        piece = content[(number - 1) * part_bytes : number * part_bytes]
        answer = httpx.put(transfer.url, headers=transfer.headers, content=piece)
        answer.raise_for_status()
        tags[number] = answer.headers["ETag"]
    return tags


def finish(transfer: p.Transfer, tags: Mapping[int, str]) -> None:
    listed = "".join(
        f"<Part><PartNumber>{n}</PartNumber><ETag>{tag}</ETag></Part>"
        for n, tag in sorted(tags.items())
    )
    body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>"
    httpx.post(transfer.url, headers=transfer.headers, content=body).raise_for_status()


def test_o17_a_large_output_is_granted_in_parts_and_becomes_one_datum(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server)
    content = bytes(range(256)) * (2 * PART_BYTES // 256) + b"end"
    grant = lease.want(wanted("model.bin", len(content))).uploads["want-model.bin"]
    assert grant.parts is not None
    assert sorted(grant.parts.parts) == [1, 2, 3]
    assert grant.parts.finish is not None
    assert all(part.expires_at is not None for part in grant.parts.parts.values())
    assert grant.transfer.method == "PUT"  # for an agent that knows no parts
    finish(grant.parts.finish, put_parts(grant.parts.parts, content, grant.parts.part_bytes))
    lease.report(
        p.OutputStored(
            upload_id=grant.upload_id, name="model.bin", size=len(content), checksums=p.Checksums()
        )
    )
    lease.finish()
    view = ExecutionView.model_validate(service.final(lease.job.execution_id).data)
    assert [(o.id, o.size) for o in view.outputs] == [(grant.upload_id, len(content))]
    with service.records.read() as conn:
        key = conn.execute(sa.select(t.datums.c.key)).scalar_one()
    with open_stores(service.settings)["s3"].open(key) as stored:
        assert stored.read() == content


def test_a_small_output_is_granted_whole(service: RunningService, redis_server: RedisServer):
    lease = lease_of(service, redis_server)
    grant = lease.want(wanted("small", PART_BYTES)).uploads["want-small"]
    assert grant.parts is None
    assert grant.transfer.expires_at is not None
    whole = httpx.put(grant.transfer.url, headers=grant.transfer.headers, content=bytes(PART_BYTES))
    whole.raise_for_status()


def test_further_and_fresh_parts_are_granted_on_request_within_the_files_size(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server)
    number = p.GRANTED_PARTS + 10
    grant = lease.want(wanted("huge", number * PART_BYTES)).uploads["want-huge"]
    assert grant.parts is not None
    assert sorted(grant.parts.parts) == list(range(1, p.GRANTED_PARTS + 1))
    further = lease.want(more(grant.upload_id, p.GRANTED_PARTS + 1, 10)).uploads["more"]
    assert further.parts is not None
    assert sorted(further.parts.parts) == list(range(p.GRANTED_PARTS + 1, number + 1))
    assert further.parts.finish is not None
    fresh = lease.want(more(grant.upload_id, 1, 1)).uploads["more"]
    assert fresh.parts is not None
    assert put_parts(fresh.parts.parts, bytes(PART_BYTES), PART_BYTES)
    most = lease.want(more(grant.upload_id, 1, 1000)).uploads["more"]
    assert most.parts is not None
    assert len(most.parts.parts) == p.GRANTED_PARTS
    only_the_end = lease.want(more(grant.upload_id, 1, 0)).uploads["more"]
    assert only_the_end.parts is not None
    assert (only_the_end.parts.parts, only_the_end.parts.finish is None) == ({}, False)
    for first, count in ((number, 2), (0, 1), (number + 1, 1)):
        refused = lease.want(more(grant.upload_id, first, count)).refused["more"]
        assert f"the parts 1 to {number}" in refused


def test_parts_of_what_is_not_this_attempts_unfinished_upload_are_refused(
    service: RunningService, redis_server: RedisServer
):
    mine = lease_of(service, redis_server)
    others = lease_of(service, redis_server)
    grant = others.want(wanted("theirs", 3 * PART_BYTES)).uploads["want-theirs"]
    small = mine.want(wanted("whole", 10)).uploads["want-whole"]
    for upload_id in (grant.upload_id, small.upload_id, "no-such-upload"):
        answer = mine.want(more(upload_id, 1, 1))
        assert "no unfinished upload in parts" in answer.refused["more"]
        assert not answer.uploads
    reported = p.OutputStored(
        upload_id=grant.upload_id, name="theirs", size=1, checksums=p.Checksums()
    )
    others.report(reported)
    assert "no unfinished upload" in others.want(more(grant.upload_id, 1, 1)).refused["more"]


def test_requests_that_make_no_sense_are_refused_with_the_reason(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server)
    requests = [wanted("less than nothing", -1), wanted("", 1), wanted("../x", 1, kind="log")]
    refused = lease.want(*requests).refused
    assert len(refused) == 3
    assert "-1 bytes" in refused["want-less than nothing"]
    assert "a log is one of stdout" in refused["want-../x"]


def test_what_stores_call_their_uploads_is_encrypted_in_the_records(
    service: RunningService, redis_server: RedisServer
):
    lease = lease_of(service, redis_server)
    grant = lease.want(wanted("big", 3 * PART_BYTES)).uploads["want-big"]
    assert grant.parts is not None
    token = httpx.URL(grant.parts.parts[1].url).params["uploadId"]
    with service.records.read() as conn:
        row = conn.execute(sa.select(t.grants)).mappings().one()
    assert row["parts"]
    assert token not in repr(dict(row))
    assert row["expires_at"] > row["granted_at"]


def test_an_input_is_granted_anew_with_another_end(
    service: RunningService, redis_server: RedisServer
):
    open_stores(service.settings)["s3"].put("in/data.csv", b"1,2,3")
    bucket = service.settings.stores["s3"].bucket  # type: ignore[union-attr]
    inputs = [InputSpec(name="data", uris=[f"s3://{bucket}/in/*.csv"])]
    service.client.submit(make_spec(inputs=inputs))
    lease = service.agent(redis_server).take()
    lease.leased()
    (file_id, first), *_ = lease.wait_grants().inputs.items()
    assert first.expires_at is not None
    request = p.GrantRequest(id="again", kind="input", name=file_id)
    again = lease.want(request).inputs[file_id]
    assert again.expires_at is not None
    assert again.expires_at >= first.expires_at
    assert httpx.get(again.url).content == b"1,2,3"


# -- stores that are slow or away ----------------------------------------------------------------------------------


class Silence:
    """A server that takes connections and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._taken: list[socket.socket] = []
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        while True:
            try:
                self._taken.append(self._socket.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for connection in self._taken:
            connection.close()


@pytest.fixture
def silence() -> Iterator[Silence]:
    silence = Silence()
    yield silence
    silence.close()


def away(url: str) -> S3StoreSettings:
    return S3StoreSettings(
        kind="s3",
        bucket="nowhere",
        endpoint_url=url,
        region="us-east-1",
        access_key_id="testing",
        secret_access_key=SecretStr("testing"),
        part_bytes=PART_BYTES,
        connect_timeout_seconds=1,
        read_timeout_seconds=1,
    )


def test_a_store_that_does_not_answer_holds_up_nobody_else_and_is_refused_by_name(
    remote: Settings,
    redis_server: RedisServer,
    silence: Silence,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(minting, "MINT_SECONDS", 4.0)
    stores = {**remote.stores, "silent": away(silence.url)}
    with running_service(static_settings(remote, stores=stores)) as service:
        held_up = lease_of(service, redis_server, upload_store="silent")
        other = lease_of(service, redis_server)
        request = wanted("big", 3 * PART_BYTES)
        held_up.report(p.GrantsWanted(requests=[request]))
        for _ in range(3):
            assert other.want(wanted("small", 1)).uploads
        stream = service.keys.grant("local", held_up.job.execution_id)
        with redis_server.client() as client:
            assert not client.exists(stream)  # the others were not held up
        refused = held_up.wait_grants(timeout=9).refused
    assert "silent" in refused[request.id]


def test_a_store_that_comes_back_is_used_as_if_nothing_had_been(
    remote: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(minting, "PAUSE_SECONDS", 0.05)
    tried = threading.Event()
    stores = {**remote.stores, "shaky": away(f"http://127.0.0.1:{free_port()}")}
    with running_service(static_settings(remote, stores=stores)) as service:
        lease = lease_of(service, redis_server, upload_store="shaky")
        assert service.service is not None
        shaky = service.service.stores["shaky"]
        begin, good = shaky.begin_parts, service.service.stores["s3"]

        def begin_or_fail(key: str, *, size: int):
            if not tried.is_set():
                tried.set()
                return begin(key, size=size)  # the address at which nobody listens
            return good.begin_parts(key, size=size)

        monkeypatch.setattr(shaky, "begin_parts", begin_or_fail)
        grant = lease.want(wanted("big", 3 * PART_BYTES)).uploads["want-big"]
    assert tried.is_set()
    assert grant.parts is not None


def test_a_defect_in_signing_is_said_instead_of_asked_about_for_ever(
    service: RunningService, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    lease = lease_of(service, redis_server)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(signing._Signing, "put", broken)
    assert "a defect" in lease.want(wanted("x", 1)).refused["want-x"]


# -- the store of outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["s3", "local", None])
def test_o15_outputs_go_to_the_store_of_the_spec_else_to_the_default_of_the_deployment(
    service: RunningService, redis_server: RedisServer, chosen: str | None
):
    lease = lease_of(service, redis_server, upload_store=chosen)
    granted = lease.want(wanted("x", 1), wanted("stdout", 1, "log")).uploads
    with service.records.read() as conn:
        found = conn.execute(sa.select(t.grants.c.upload_id, t.grants.c.store)).all()
    stores = {row.upload_id: row.store for row in found}
    assert stores[granted["want-x"].upload_id] == (chosen or service.settings.default_store)
    assert stores[granted["want-stdout"].upload_id] == service.settings.log_store_name


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("locals", "no store 'locals' in the settings; did you mean 'local'?"),
        ("zzz", "no store 'zzz' in the settings; known are local, s3, theirs"),
        ("theirs", "'theirs' can only be read"),
        (None, "'theirs' can only be read"),
    ],
)
def test_o15_a_store_that_takes_no_outputs_is_refused_before_anything_runs(
    remote: Settings, tmp_path: Path, chosen: str | None, words: str
):
    theirs = LocalStoreSettings(path=tmp_path / "theirs", readonly=True)
    values = {"stores": {**remote.stores, "theirs": theirs}}
    if chosen is None:
        values |= {"default_store": "theirs", "log_store": "local", "code_store": "local"}
    with running_service(static_settings(remote, **values)) as service:
        spec = make_spec(upload_store=chosen)
        service.client.submit(spec)
        view = ExecutionView.model_validate(service.final(spec.execution_id).data)
    assert view.status is ExecutionStatus.error
    assert view.started_at is None
    assert words in str(view.reason)
    if "read" in words:
        assert "stores that take outputs are local, s3" in str(view.reason)


# -- local stores ----------------------------------------------------------------------------------------------


def test_a_group_that_does_not_see_local_stores_is_refused_them_at_submission(
    remote: Settings, redis_server: RedisServer
):
    group = StaticGroupSettings(kind="static", local_stores=False)
    with running_service(static_settings(remote, groups={"local": group})) as service:
        spec = make_spec(inputs=[InputSpec(name="data", uris=["store://local/in.csv"])])
        open_stores(remote)["local"].put("in.csv", b"1")
        service.client.submit(spec)
        view = ExecutionView.model_validate(service.final(spec.execution_id).data)
    assert view.status is ExecutionStatus.error
    assert "local_stores = true in [groups.local]" in str(view.reason)
    assert "'local'" in str(view.reason)


def test_a_group_that_does_not_see_local_stores_runs_what_needs_none(
    remote: Settings, redis_server: RedisServer
):
    group = StaticGroupSettings(kind="static", local_stores=False)
    values = {"groups": {"local": group}, "default_store": "s3"}
    with running_service(static_settings(remote, **values)) as service:
        commit = make_spec().commit.model_copy(update={"archive_store": "s3"})
        lease = lease_of(service, redis_server, commit=commit, upload_store=None)
        assert lease.want(wanted("x", 1)).uploads


def test_local_stores_are_not_granted_once_the_group_does_not_see_them_any_more(
    remote: Settings, redis_server: RedisServer
):
    with running_service(remote) as service:
        lease = lease_of(service, redis_server, upload_store="local")
        assert lease.want(wanted("x", 1)).uploads
    group = StaticGroupSettings(kind="static", local_stores=False)
    with running_service(static_settings(remote, groups={"local": group})) as service:
        refused = lease.want(wanted("y", 1)).refused["want-y"]
    assert "local_stores = true" in refused
