"""Many input files that are reported at once (I-32)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.executions.stream import EventKind, ExecutionStatus
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings

FILES = 450


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(settings) as service:
        yield service


def ready(lease: SimLease, content: str) -> list[p.InputReady]:
    return [
        p.InputReady(
            input="data",
            file_id=file.id,
            name=file.name,
            size=3,
            checksums=p.Checksums(md5="0" * 32, sha1="1" * 40, sha256=f"{content}{number:063d}"),
            cached=number % 2 == 0,
            version=f"etag-{number}" if number else None,
        )
        for number, file in enumerate(lease.job.inputs[0].files)
    ]


def test_i32_checksums_of_many_files_are_recorded_with_each_use(
    service: RunningService, redis_server: RedisServer
) -> None:
    agent = service.agent(redis_server)
    uris = [f"http://example.org/{number}.csv" for number in range(FILES)]
    told: list[list[str]] = []
    for content in "ab":
        spec = make_spec(inputs=[InputSpec(name="data", uris=uris)])
        service.client.submit(spec)
        lease = agent.take()
        assert lease.job.batches
        lease.leased()
        lease.wait_grants()
        files = ready(lease, content)
        for start in range(0, FILES, p.MAX_INPUTS_READY):
            lease.report(p.InputsReady(files=files[start : start + p.MAX_INPUTS_READY]))
        lease.finish()
        final = service.final(spec.execution_id)
        assert ExecutionStatus(final.data["status"]) is ExecutionStatus.complete
        c = t.execution_inputs.c
        with service.records.read() as conn:
            query = sa.select(c.file_id, c.sha256, c.cached, c.version, c.size, c.md5)
            rows = conn.execute(query.where(c.execution_id == spec.execution_id)).all()
        assert {tuple(row) for row in rows} == {
            (f.file_id, f.checksums.sha256, f.cached, f.version, 3, "0" * 32) for f in files
        }
        events = service.events(spec.execution_id, lambda e: e.kind is EventKind.final)
        warned = [e.message for e in events if e.kind is EventKind.warning]
        told.append(warned)
    first, second = told
    assert not first
    assert len(second) < 40  # some are named, of the others the number is told
    assert "http://example.org/0.csv differs from its last use" in second[0]
    assert any("further files have changed" in text for text in second)


def test_what_an_older_agent_reports_file_by_file_is_recorded_the_same(
    service: RunningService, redis_server: RedisServer
) -> None:
    spec = make_spec(inputs=[InputSpec(name="data", uris=["http://example.org/a.csv"])])
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    for file in ready(lease, "c"):
        lease.report(file)
    lease.finish()
    service.final(spec.execution_id)
    with service.records.read() as conn:
        found = conn.execute(sa.select(t.execution_inputs.c.sha256)).scalars().all()
    assert found == [f"c{0:063d}"]
