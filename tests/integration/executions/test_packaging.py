"""Conductors pack dataset versions in the background and give packages to workers (O-23, I-09)."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service, static_settings
from tests.support.sim_agent import SimLease
from valohai_agent import protocol as p
from valohai_agent.protocol import utcnow
from valohai_dagster.data import datasets, packages
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.package_removal import remove_packages
from valohai_dagster.data.package_writing import Stopped
from valohai_dagster.executions import packaging, sweeping
from valohai_dagster.executions.stream import EventKind, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.records.store import insert_ignore
from valohai_dagster.settings import Settings

WISH = {"valohai.dataset-versions": [{"uri": "dataset://faces/v1", "packaging": True}]}
URI = "dataset://faces/v1"
CONTENTS = {f"sub/{number}": bytes([number]) * 20_000 for number in range(7)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(packaging, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(sweeping, "SWEEP_SECONDS", 0.05)


@pytest.fixture
def service(settings: Settings, quick: None) -> Iterator[RunningService]:
    with running_service(static_settings(settings, package_bytes=65_536)) as service:
        yield service


def make_version(service: RunningService, redis_server: RedisServer) -> ExecutionView:
    """An execution whose outputs are the version."""
    service.client.submit(make_spec())
    lease = service.agent(redis_server, "maker").take()
    lease.leased()
    lease.wait_grants()
    for name, content in CONTENTS.items():
        lease.store(name, content, **WISH)
    lease.finish()
    return ExecutionView.model_validate(service.final(lease.job.execution_id).data)


def version_of(conn: sa.Connection) -> datasets.DatasetVersion:
    project = conn.execute(sa.select(t.projects.c.id)).scalar_one()
    return datasets.get_version(conn, URI, project_id=project)


def standing(service: RunningService) -> packages.Packaging:
    with service.records.read() as conn:
        found = packages.packaging_of(conn, version_of(conn).id)
    assert found is not None
    return found


def until(
    service: RunningService, right: Callable[[packages.Packaging], bool]
) -> packages.Packaging:
    known = wait_for(
        lambda: known if right(known := standing(service)) else None,
        seconds=20,
        what="the packages",
    )
    assert known is not None
    return known


def made(service: RunningService) -> list[packages.Package]:
    until(service, lambda known: known.state == packages.MADE)
    with service.records.read() as conn:
        return packages.packages_of(conn, version_of(conn).id)


def read_version(service: RunningService, redis_server: RedisServer) -> SimLease:
    """An execution that has the version as its input, leased."""
    service.client.submit(make_spec(inputs=[InputSpec(name="in", uris=[URI])]))
    lease = service.agent(redis_server, str(uuid.uuid4())).take()
    lease.leased()
    return lease


def stored(service: RunningService) -> list[str]:
    found = service.settings.state_dir.rglob("packages/**/*")
    return sorted(path.as_posix() for path in found if path.is_file())


def uploads(service: RunningService) -> list[str]:
    with service.records.read() as conn:
        return list(conn.execute(sa.select(t.uploads.c.key)).scalars())


def test_o23_i09_a_version_is_packed_and_its_files_are_granted_as_packages(
    service: RunningService, redis_server: RedisServer
) -> None:
    maker = make_version(service, redis_server)
    assert maker.warnings == []
    found = made(service)
    assert [package.files for package in found] == [3, 3, 1]
    assert all(package.size <= 65_536 for package in found)
    assert len(stored(service)) == 3
    assert uploads(service) == []

    lease = read_version(service, redis_server)
    job = lease.job
    assert [package.uri for package in job.packages] == [
        f"{URI}, package {number} of 3" for number in (1, 2, 3)
    ]
    granted = lease.wait_grants().inputs
    assert set(granted) == {package.id for package in job.packages}
    singly = lease.want(p.GrantRequest(id="x", kind="input", name="0.0")).inputs
    assert set(singly) == {"0.0"}
    # lineage is that of the files
    with service.records.read() as conn:
        mine = t.execution_inputs.c.execution_id == job.execution_id
        rows = conn.execute(sa.select(t.execution_inputs).where(mine)).all()
    assert {row.name for row in rows} == {name.removeprefix("sub/") for name in CONTENTS}
    assert {row.datum_id for row in rows} == {output.id for output in maker.outputs}


def test_i09_a_purged_file_is_not_delivered_out_of_a_package(
    service: RunningService, redis_server: RedisServer
) -> None:
    """Also to an execution that was created before, by a grant that it asks for later."""
    maker = make_version(service, redis_server)
    made(service)
    lease = read_version(service, redis_server)
    lease.wait_grants()
    with service.records.write() as conn:
        removals = packages.drop_holding(conn, [maker.outputs[0].id], utcnow())
    ids = [package.id for package in lease.job.packages]
    answer = lease.want(p.GrantRequest(id="x", kind="input", name=ids[0]))
    assert "the package was given up" in answer.refused[ids[0]]
    assert service.service is not None
    remove_packages(service.records, service.service.stores, removals)
    assert stored(service) == []
    assert uploads(service) == []
    assert standing(service).state == packages.DROPPED


def test_o23_a_dead_conductors_packages_are_gone_on_with(
    settings: Settings, quick: None, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had stored is kept, what it had not finished is swept."""
    first: list[str] = []
    write = packaging.write_package

    def die_at_the_second(*args: Any, **kwargs: Any) -> Any:
        """As a process that is killed: nothing of it cleans up or tells anybody."""
        if first:
            kwargs["stop"].wait()
            raise Stopped
        first.append(args[3])
        return write(*args, **kwargs)

    monkeypatch.setattr(packaging, "write_package", die_at_the_second)
    with running_service(
        static_settings(settings, package_bytes=65_536, sweep_after_seconds=0)
    ) as service:
        make_version(service, redis_server)
        wait_for(lambda: first, seconds=20, what="the first package")
        (unfinished,) = wait_for(
            lambda: [key for key in uploads(service) if key not in first],
            seconds=20,
            what="the second package",
        )
        with monkeypatch.context() as dead:
            dead.setattr(packaging.Packager, "_remove", _nothing)
            service.kill()
        assert unfinished in uploads(service)
        with service.records.write() as conn:  # an hour later
            conn.execute(t.uploads.update().values(expires_at=utcnow() - timedelta(hours=1)))
            conn.execute(t.packagings.update().values(due=utcnow()))
        monkeypatch.setattr(packaging, "write_package", write)
        service.start()
        found = made(service)
        assert [package.key for package in found][:1] == first
        assert [package.files for package in found] == [3, 3, 1]
        wait_for(lambda: not uploads(service), seconds=20, what="the sweep")
        assert len(stored(service)) == 3


async def _nothing(*_: Any) -> None:
    """What a dead process does."""


def test_o23_a_package_that_nobody_wants_any_more_is_not_finished(
    service: RunningService, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = threading.Event()

    def slow(*args: Any, stop: threading.Event) -> Any:
        writing.set()
        stop.wait()
        raise Stopped

    monkeypatch.setattr(packaging, "write_package", slow)
    make_version(service, redis_server)
    assert writing.wait(20)
    with service.records.write() as conn:
        packages.drop(conn, version_of(conn).id, "switched off", utcnow())
    wait_for(lambda: not uploads(service), seconds=20, what="the end of writing")
    assert standing(service).state == packages.DROPPED
    assert stored(service) == []


def test_o23_a_store_that_hangs_does_not_keep_the_conductor(
    service: RunningService, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to go, it leaves the unfinished package to the sweep."""
    writing, store_answers = threading.Event(), threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        writing.set()
        store_answers.wait()
        raise Stopped

    monkeypatch.setattr(packaging, "write_package", hang)
    make_version(service, redis_server)
    try:
        assert writing.wait(20)
        assert service.service is not None
        assert service.service.packager.busy
        service.leave()
        assert not service.service.packager.busy
    finally:
        store_answers.set()
    assert len(uploads(service)) == 1


def test_o23_what_cannot_be_packed_is_told_to_whoever_reads_the_version(
    service: RunningService, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("https://store/?signature=secret")

    monkeypatch.setattr(packaging, "write_package", broken)
    make_version(service, redis_server)
    known = until(service, lambda known: known.state == packages.FAILED)
    assert known.problem == "a defect while writing a package (ValueError), see the conductor's log"
    lease = read_version(service, redis_server)
    assert lease.job.packages == []
    (notice,) = [line for line in lease.job.notices if "packed" in line]
    assert "could not be packed" in notice
    assert known.problem is not None
    assert known.problem in notice
    assert len(lease.wait_grants().inputs) == len(CONTENTS)
    assert uploads(service) == []


def test_o23_a_store_that_is_away_is_waited_for(
    settings: Settings, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaging, "FIRST_PAUSE", timedelta(seconds=0))
    mount = tmp_path / "mount"
    values = settings.model_dump()
    values["stores"]["mount"] = {"kind": "local", "path": mount, "readonly": True}
    with running_service(static_settings(Settings(**values))) as service:
        with service.records.write() as conn:
            now = utcnow()
            insert_ignore(conn, t.projects, id="p", name="digits", counter=0, ctime=now)
            row = {"id": str(uuid.uuid4()), "name": "a", "size": 1, "store": "mount", "key": "a"}
            conn.execute(t.datums.insert().values(**row, project_id="p", ctime=now))
            made_here = datasets.create_version(
                conn, project_id="p", uri=URI, datum_ids=[row["id"]], now=now
            )
            packages.want(conn, made_here.id, now)
        known = until(service, lambda known: known.tries > 0)
        assert known.state == packages.WANTED
        assert "is its mount missing?" in (known.problem or "")
        mount.mkdir()
        (mount / "a").write_bytes(b"a")
        (package,) = made(service)
        assert package.store == "local"
        with service.records.read() as conn:
            assert conn.execute(sa.select(t.datums.c.sha256)).scalar_one() == (
                "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
            )


def test_o23_what_was_made_is_told_in_the_run(
    service: RunningService, redis_server: RedisServer
) -> None:
    maker = make_version(service, redis_server)
    events = service.events(maker.id, lambda event: event.kind is EventKind.final)
    (told,) = [event.message for event in events if "packed" in event.message]
    assert told.startswith(f"{URI} will be packed in the background; it has 7 files")


def test_o23_a_try_waits_longer_each_time() -> None:
    known = packages.Packaging(version_id="v", state="wanted", due=utcnow(), ctime=utcnow())
    assert packaging.pause(known) == packaging.FIRST_PAUSE
    assert packaging.pause(None) == packaging.FIRST_PAUSE
    tries = [
        packaging.pause(packages.Packaging(**{**vars(known), "tries": number}))
        for number in range(20)
    ]
    assert tries == sorted(tries)
    assert tries[-1] == packaging.LONGEST_PAUSE
