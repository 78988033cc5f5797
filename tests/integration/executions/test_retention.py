"""Retention over real records (SQLite and Postgres) and a real store: what goes, what stays, and going on after a cut."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.postgres_server import wait_for_blocked
from tests.support.redis_server import RedisServer
from tests.support.service import make_spec, running_service, static_settings
from valohai_dagster.data import datums
from valohai_dagster.data.adoption import adopt, find_candidates
from valohai_dagster.data.aliases import set_alias
from valohai_dagster.data.own_uploads import give_up, note_removal
from valohai_dagster.errors import RefusedError, StoreUnavailable
from valohai_dagster.executions import retention_reading
from valohai_dagster.executions.archives import record_commit
from valohai_dagster.executions.retention import Done, carry_out, plan_records
from valohai_dagster.executions.retention_rules import Plan
from valohai_dagster.executions.spec_model import CommitRef, InputSpec
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_retention import RetentionSettings
from valohai_dagster.stores.registry import Stores, open_stores

NOW = datetime(2026, 6, 1, tzinfo=timezone.utc)
ALL = RetentionSettings(logs_days=30, outputs_days=30, metadata_days=30, code_days=30)


@dataclass
class Site:
    records: Records
    stores: Stores
    count: int = 0

    def execution(
        self, days: float | None, *, commit: str = "c1", tags: tuple[str, ...] = ()
    ) -> str:
        """One that ended so many days ago, with a log and two lines of metadata."""
        self.count += 1
        ident, ended = str(uuid.uuid4()), NOW - timedelta(days=days) if days is not None else None
        key = f"logs/{ident}/stdout"
        self.stores.log.put(key, b"hello\n")
        log = {"store": "local", "key": key, "size": 6, "lines": 1}
        with self.records.write() as conn:
            conn.execute(
                t.executions.insert().values(
                    id=ident,
                    project_id="p",
                    counter=self.count,
                    step="train",
                    commit=commit,
                    group_name="local",
                    image="i",
                    spec={},
                    tags=list(tags),
                    status="complete" if ended else "started",
                    cumulative_metadata={"epoch": 2},
                    ctime=(ended or NOW) - timedelta(hours=1),
                    ended_at=ended,
                )
            )
            conn.execute(
                t.attempts.insert().values(execution_id=ident, number=1, logs={"stdout": log})
            )
            for number in (1, 2):
                row = {"execution_id": ident, "number": number, "attempt": 1, "time": NOW}
                conn.execute(t.metadata_events.insert().values(**row, values={"epoch": number}))
        return ident

    def attempts(self, execution: str, *numbers: int) -> None:
        """Further ones of it, with a log each."""
        for number in numbers:
            log = {"store": "local", "key": f"logs/{execution}/{number}", "size": 6, "lines": 1}
            row = {"execution_id": execution, "number": number, "logs": {"stdout": log}}
            with self.records.write() as conn:
                conn.execute(t.attempts.insert().values(**row))

    def output(self, execution: str | None, **values: Any) -> str:
        ident = str(uuid.uuid4())
        key = f"data/{ident}/w.bin"
        self.stores.default.put(key, b"12345")
        row = {"id": ident, "name": "w.bin", "size": 5, "store": "local", "key": key}
        more = {"project_id": "p", "execution_id": execution, "ctime": NOW, **values}
        with self.records.write() as conn:
            conn.execute(t.datums.insert().values(**{**row, **more}))
        return ident

    def reads(self, execution: str, datum: str) -> None:
        row = {"execution_id": execution, "file_id": datum, "input": "data", "name": "w.bin"}
        with self.records.write() as conn:
            conn.execute(
                t.execution_inputs.insert().values(**row, uri=f"datum://{datum}", datum_id=datum)
            )

    def commit(self, identifier: str, days: float) -> str:
        key = f"commits/{identifier}.tar.gz"
        self.stores.code.put(key, b"archive")
        row = {"id": str(uuid.uuid4()), "project_id": "p", "identifier": identifier, "adhoc": False}
        place = {"archive_store": "local", "archive_key": key, "archive_sha256": "a" * 64}
        with self.records.write() as conn:
            conn.execute(
                t.commits.insert().values(
                    **row, **place, archive_size=7, ctime=NOW - timedelta(days=days)
                )
            )
        return key

    def retain(self, policy: RetentionSettings = ALL, **options: Any) -> tuple[Plan, Done]:
        plan = plan_records(self.records, policy, NOW, **options)
        return plan, carry_out(self.records, self.stores, policy, plan, NOW)

    def datum(self, ident: str) -> Any:
        with self.records.read() as conn:
            return conn.execute(sa.select(t.datums).where(t.datums.c.id == ident)).one()

    def is_there(self, ident: str) -> bool:
        return self.stores.default.stat(self.datum(ident).key) is not None


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def site(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Site]:
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        settings = settings.model_copy(update={"database_url": url})
    records = open_records(settings)
    with records.write() as conn:
        conn.execute(t.projects.insert().values(id="p", name="digits", counter=1, ctime=NOW))
    yield Site(records=records, stores=open_stores(settings))
    records.close()


def test_o20_old_outputs_lose_their_content_and_keep_their_record(site: Site) -> None:
    old, fresh = site.execution(40), site.execution(3)
    gone, kept = site.output(old), site.output(fresh)
    plan, done = site.retain()
    assert [(item.id, item.bytes) for item in plan.of("outputs")] == [(gone, 5)]
    assert "ended 40 days ago, outputs are kept for 30" in plan.of("outputs")[0].why
    assert (done.counts["outputs"], done.bytes["outputs"]) == (1, 5)
    row = site.datum(gone)
    assert (row.purged, row.purged_at, row.name) == (True, NOW, "w.bin")
    assert not site.is_there(gone)
    assert site.is_there(kept)
    assert not site.datum(kept).purged


def test_what_has_a_name_or_a_kept_reader_stays(site: Site) -> None:
    old = site.execution(40)
    aliased, tagged, used, in_dataset, adopted, uploaded = (
        site.output(old),
        site.output(old, tags=["good"]),
        site.output(old),
        site.output(old),
        site.output(old, adopted=True),
        site.output(None),
    )
    site.reads(site.execution(5), used)
    with site.records.write() as conn:
        set_alias(conn, project_id="p", name="best", datum_id=aliased, now=NOW)
        ids = {"id": "d", "project_id": "p", "name": "faces", "ctime": NOW}
        conn.execute(t.datasets.insert().values(**ids))
        version = {"id": "v", "dataset_id": "d", "name": "1", "state": "closed", "ctime": NOW}
        conn.execute(t.dataset_versions.insert().values(**version))
        conn.execute(t.dataset_files.insert().values(version_id="v", datum_id=in_dataset))
    plan, _ = site.retain()
    assert plan.of("outputs") == []
    assert set(plan.kept) == {
        "an alias names it",
        "it has a tag",
        "a kept execution has read it",
        "it is in a dataset version",
    }
    assert all(map(site.is_there, (aliased, tagged, used, in_dataset, adopted, uploaded)))


def test_an_alias_that_came_after_the_plan_keeps_its_output(site: Site) -> None:
    ident = site.output(site.execution(40))
    plan = plan_records(site.records, ALL, NOW)
    with site.records.write() as conn:
        set_alias(conn, project_id="p", name="best", datum_id=ident, now=NOW)
    carry_out(site.records, site.stores, ALL, plan, NOW)
    assert site.is_there(ident)
    assert not site.datum(ident).purged


def test_content_that_two_records_share_stays_for_the_other(site: Site) -> None:
    gone = site.output(site.execution(40))
    site.output(None, key=site.datum(gone).key)
    site.retain()
    assert site.datum(gone).purged
    assert site.is_there(gone)


def test_logs_go_and_their_rows_say_so(site: Site) -> None:
    old, running = site.execution(40), site.execution(None)
    _, done = site.retain()
    assert done.counts["logs"] == 1
    with site.records.read() as conn:
        logs = {row.execution_id: row.logs for row in conn.execute(sa.select(t.attempts))}
    assert logs[old]["stdout"] == {
        "store": "local",
        "size": 6,
        "lines": 1,
        "removed_at": "2026-06-01T00:00:00+00:00",
    }
    assert site.stores.log.stat(f"logs/{old}/stdout") is None
    assert logs[running]["stdout"]["key"]
    assert site.retain()[0].of("logs") == []


def test_metadata_lines_go_and_the_last_values_stay(site: Site) -> None:
    old, fresh = site.execution(40), site.execution(3)
    plan, done = site.retain()
    assert plan.of("metadata")[0].name.startswith("2 lines of train #")
    assert done.counts["metadata"] == 1
    with site.records.read() as conn:
        left = conn.execute(sa.select(t.metadata_events.c.execution_id)).scalars().all()
        e = t.executions.c
        last = conn.execute(sa.select(e.cumulative_metadata).where(e.id == old)).scalar_one()
    assert (left, last) == ([fresh, fresh], {"epoch": 2})


def test_archives_go_unless_lately_used_running_or_the_newest(site: Site) -> None:
    keys = {
        name: site.commit(name, days)
        for name, days in (("old", 99), ("used", 99), ("busy", 99), ("head", 90))
    }
    site.execution(50, commit="old")
    site.execution(5, commit="used")
    site.execution(None, commit="busy")
    plan, done = site.retain()
    assert [item.name for item in plan.of("code")] == ["commit old"]
    assert done.counts["code"] == 1
    assert {name for name, key in keys.items() if site.stores.code.stat(key)} == {
        "used",
        "busy",
        "head",
    }
    with site.records.read() as conn:
        assert len(conn.execute(sa.select(t.commits.c.id)).all()) == 3


def test_work_is_bounded_and_goes_on_where_it_stopped(site: Site) -> None:
    ids = [site.output(site.execution(40)) for _ in range(7)]
    cursors: dict[str, str] = {}
    looks = 0
    while True:
        plan, done = site.retain(most=2, cursors=cursors)
        assert len(plan.of("outputs")) <= 2
        looks += 1
        cursors = done.cursors
        if not cursors:
            break
    assert looks >= 4
    assert not any(map(site.is_there, ids))


def test_a_store_that_is_away_costs_only_its_own_files_and_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked before it is deleted, so a cut in between is taken up by the next plan."""
    ident = site.output(site.execution(40))

    def refuse(key: str) -> None:
        raise StoreUnavailable("the store is away", store="local")

    with monkeypatch.context() as patch:
        patch.setattr(site.stores.default, "delete", refuse)
        _, done = site.retain()
    assert any("could not be removed: the store is away" in text for text in done.problems)
    assert (site.datum(ident).purged, site.datum(ident).purged_at) == (True, None)
    assert site.is_there(ident)
    site.retain()
    assert site.datum(ident).purged_at == NOW
    assert not site.is_there(ident)


def test_what_came_to_be_needed_after_the_plan_stays(site: Site) -> None:
    old = site.execution(40)
    read, tagged, in_model, gone = (site.output(old) for _ in range(4))
    plan = plan_records(site.records, ALL, NOW)
    assert len(plan.of("outputs")) == 4
    site.reads(site.execution(None), read)
    with site.records.write() as conn:
        datums.add_tags(conn, tagged, ["keep"])
        conn.execute(t.models.insert().values(id="m", project_id="p", slug="net", ctime=NOW))
        version = {"id": "v", "model_id": "m", "number": 1, "status": "pending", "ctime": NOW}
        conn.execute(t.model_versions.insert().values(**version))
        conn.execute(t.model_files.insert().values(version_id="v", datum_id=in_model))
    carry_out(site.records, site.stores, ALL, plan, NOW)
    assert [site.datum(ident).purged for ident in (read, tagged, in_model, gone)] == [0, 0, 0, 1]
    assert all(map(site.is_there, (read, tagged, in_model)))


@pytest.mark.parametrize(
    "site", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
def test_what_is_being_given_to_an_execution_right_now_is_left_to_the_next_plan(site: Site) -> None:
    """The transaction of an admission, which has not written its inputs yet."""
    ident, other = (site.output(site.execution(40)) for _ in range(2))
    with site.records.write() as conn:
        datums.hold(conn, [ident])
        site.retain()
    assert (site.datum(ident).purged, site.datum(other).purged) == (False, True)
    assert site.is_there(ident)
    site.retain()
    assert site.datum(ident).purged
    with site.records.write() as conn, pytest.raises(RefusedError, match="the content was purged"):
        datums.hold(conn, [ident])


def test_outputs_of_lost_attempts_go_too(site: Site) -> None:
    old, fresh = site.execution(40), site.execution(5)
    gone, kept = site.output(old, withdrawn=True), site.output(fresh, withdrawn=True)
    plan, _ = site.retain()
    assert [item.id for item in plan.of("outputs")] == [gone]
    assert plan.of("outputs")[0].name == "w.bin of train #1"
    assert (site.is_there(gone), site.is_there(kept)) == (False, True)


def test_an_archive_is_forgotten_before_it_goes_and_left_to_the_sweep_when_it_cannot(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is sent to an archive that is about to be deleted."""
    key, _ = site.commit("old", 99), site.commit("head", 90)

    def known() -> list[str]:
        with site.records.read() as conn:
            return list(conn.execute(sa.select(t.commits.c.identifier)).scalars())

    def refuse(key: str) -> None:
        assert known() == ["head"]
        raise StoreUnavailable("the store is away", store="local")

    with monkeypatch.context() as patch:
        patch.setattr(site.stores.code, "delete", refuse)
        _, done = site.retain()
    assert any("commit old" in text for text in done.problems)
    assert known() == ["head"]
    assert site.stores.code.stat(key) is not None
    with site.records.write() as conn:
        left = give_up(conn, before=NOW + timedelta(hours=1))
    assert [(upload.kind, upload.key) for upload in left] == [("code", key)]


def commit_at(key: str) -> CommitRef:
    return CommitRef(
        identifier="same",
        adhoc=False,
        archive_store="local",
        archive_key=key,
        archive_sha256="a" * 64,
    )


@pytest.mark.parametrize(
    "site", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
def test_a_commit_of_the_same_archive_that_is_just_being_recorded_keeps_it(site: Site) -> None:
    key, _ = site.commit("old", 99), site.commit("head", 90)
    same = commit_at(key)
    with site.records.write() as conn:
        assert record_commit(conn, "digits", same, NOW)
        retention = threading.Thread(target=site.retain)
        retention.start()
        wait_for_blocked(site.records.engine)
    retention.join()
    assert site.stores.code.stat(key) is not None
    with site.records.read() as conn:
        found = conn.execute(sa.select(t.commits.c.identifier)).scalars().all()
        assert conn.execute(sa.select(t.uploads)).all() == []
    assert sorted(found) == ["head", "same"]


def test_an_archive_that_is_being_removed_is_not_recorded(site: Site) -> None:
    site.commit("head", 1)
    with site.records.write() as conn:
        note_removal(conn, kind="code", name="commit", store="local", key="k", now=NOW)
        assert not record_commit(conn, "digits", commit_at("k"), NOW)


def test_a_page_that_ends_between_two_attempts_leaves_none_out(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_reading, "PAGE", 2)
    ids = [site.execution(40) for _ in range(2)]
    for ident in ids:
        site.attempts(ident, 2, 10)
    wanted = sorted(f"{ident}/{number}" for ident in ids for number in (1, 2, 10))
    plan = plan_records(site.records, ALL, NOW)
    assert sorted(item.id for item in plan.of("logs")) == wanted
    found: list[str] = []
    cursors: dict[str, str] = {}
    while True:
        part = plan_records(site.records, ALL, NOW, most=1, cursors=cursors)
        found += [item.id for item in part.of("logs")]
        cursors = {kind: at for kind, at in part.cursors.items() if kind == "logs"}
        if not cursors:
            break
    assert sorted(found) == wanted
    assert len(found) == len(set(found))


def test_i40_what_the_product_keeps_itself_is_not_adopted(site: Site) -> None:
    old = site.execution(40)
    output, commit = site.output(old), site.commit("abc", 99)
    going_on = f"data/p/{uuid.uuid4()}/{uuid.uuid4()}/w.bin"
    for key in (going_on, "data/mine/a.csv"):
        site.stores.default.put(key, b"1")
    candidates, _ = find_candidates(["store://local/**"], site.stores)
    adopted = adopt(site.records, candidates, project_id="p", now=NOW)
    assert [datum.key for datum in adopted.created.values()] == ["data/mine/a.csv"]
    assert [datum.id for datum in adopted.existing.values()] == [output]
    (refused,) = adopted.refused
    assert refused.code == "adoptable_file_is_ours"
    assert "store://local/**: 3 of the objects are files of this product" in refused.message
    assert {going_on, commit, f"logs/{old}/stdout"} == {c.stat.key for c in candidates} - {
        site.datum(output).key,
        "data/mine/a.csv",
    }
    site.retain()
    assert all(map(site.is_there, (datum.id for datum in adopted.created.values())))


def test_an_execution_waits_for_retention_and_is_refused_what_went(
    settings: Settings, redis_server: RedisServer, postgres_url: str
) -> None:
    """Retention has decided and not committed yet when the execution is submitted."""
    with running_service(static_settings(settings, database_url=postgres_url)) as service:
        place = {"store": "local", "key": "data/x", "ctime": NOW}
        ident = str(uuid.uuid4())
        with service.records.write() as conn:
            conn.execute(t.datums.insert().values(id=ident, name="w.bin", size=5, **place))
        uris = [f"datum://{ident}"]
        spec = make_spec(inputs=[InputSpec(name="data", uris=uris)])
        with service.records.write() as conn:
            datums.lock(conn, [ident])
            submitting = threading.Thread(target=service.client.submit, args=(spec,))
            submitting.start()
            wait_for_blocked(service.records.engine)
            datums.mark_purged(conn, [ident])
        submitting.join(30)
        view = ExecutionView.model_validate(service.final(spec.execution_id, timeout=30).data)
    assert view.status is ExecutionStatus.error
    assert "the content was purged" in (view.reason or "")
