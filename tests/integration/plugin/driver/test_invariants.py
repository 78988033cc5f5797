"""The checker behind the recovery tests sees what it is there to see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import redis
import sqlalchemy as sa

from tests.support.invariants import Findings, check
from valohai_agent.protocol import Keys
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings


class Storage:
    """One finished run of Dagster's own engine, and our tables beside it."""

    def __init__(self, url: str, instance: dg.DagsterInstance, run_id: str) -> None:
        self.instance, self.run_id = instance, run_id
        self._engine = sa.create_engine(url)

    def sql(self, text: str, **values: object) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.text(text), {"run": self.run_id, **values})

    def again(self, kind: str) -> None:
        """The run's event of that type is in the log once more."""
        self.sql(
            "INSERT INTO event_logs (run_id, event, dagster_event_type, timestamp, step_key, asset_key)"
            " SELECT run_id, event, dagster_event_type, timestamp, step_key, asset_key FROM event_logs"
            " WHERE run_id = :run AND dagster_event_type = :kind",
            kind=kind,
        )

    def check(self, **options: object) -> Findings:
        return check(self._engine, [self.run_id], **options)  # type: ignore[arg-type]

    def close(self) -> None:
        self._engine.dispose()


@pytest.fixture
def storage(postgres_url: str, tmp_path: Path) -> Iterator[Storage]:
    @dg.asset(code_version="1")
    def part() -> None: ...

    open_records(Settings(state_dir=tmp_path / "state", database_url=postgres_url)).close()
    overrides = {"storage": {"postgres": {"postgres_url": postgres_url}}}
    with dg.instance_for_test(overrides=overrides) as instance:
        result = dg.materialize([part], instance=instance)
        found = Storage(postgres_url, instance, result.run_id)
        yield found
        found.close()


def test_a_run_as_it_should_be_is_no_finding(storage: Storage) -> None:
    found = storage.check()
    assert found.good, str(found)
    assert found.runs == 1


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("ASSET_MATERIALIZATION", "has 2 ASSET_MATERIALIZATION"),
        ("STEP_SUCCESS", "ended 2 times"),
        ("PIPELINE_SUCCESS", "ended more than once"),
        ("PIPELINE_START", "has 2 PIPELINE_START"),
        ("STEP_START", "has 2 STEP_START"),
        ("STEP_OUTPUT", "has 2 STEP_OUTPUT"),
    ],
)
def test_an_event_that_is_there_twice_is_doubled(storage: Storage, kind: str, text: str) -> None:
    storage.again(kind)
    assert any(text in line for line in storage.check().doubled)


@pytest.mark.parametrize("kind", ["ASSET_MATERIALIZATION", "STEP_SUCCESS", "PIPELINE_SUCCESS"])
def test_an_event_that_is_missing_is_lost(storage: Storage, kind: str) -> None:
    storage.sql(
        "DELETE FROM event_logs WHERE run_id = :run AND dagster_event_type = :kind", kind=kind
    )
    assert storage.check().lost


def test_runs_without_an_end_or_with_a_wrong_one_are_lost(storage: Storage) -> None:
    storage.sql("UPDATE runs SET status = 'STARTED' WHERE run_id = :run")
    assert "is STARTED" in storage.check().lost[0]
    storage.sql("UPDATE runs SET status = 'FAILURE' WHERE run_id = :run")
    assert "ended as FAILURE instead of SUCCESS" in storage.check().lost[0]
    storage.sql("UPDATE runs SET status = 'SUCCESS', end_time = NULL WHERE run_id = :run")
    assert "without times" in storage.check().lost[0]
    storage.sql("DELETE FROM runs WHERE run_id = :run")
    assert "is not in the storage" in storage.check().lost[0]


def test_the_second_half_of_an_event_is_missed(storage: Storage) -> None:
    storage.sql("DELETE FROM asset_event_tags")
    storage.sql("UPDATE asset_keys SET last_materialization = NULL")
    lost = "\n".join(storage.check().lost)
    assert "has no tags" in lost
    assert "the asset index of" in lost


def test_a_run_whose_driving_was_not_closed_is_lost(storage: Storage) -> None:
    storage.sql(
        "INSERT INTO vh_runs (run_id, instance_id, shard, handover, state, ctime)"
        " VALUES (:run, 'x', 0, '{}', 'driving', now())"
    )
    assert "vh_runs says driving" in storage.check().lost[0]


def test_slots_that_nobody_frees_are_left(storage: Storage) -> None:
    log = storage.instance.event_log_storage
    log.set_concurrency_slots("scarce", 1)
    log.claim_concurrency_slot("scarce", storage.run_id, "part")
    log.claim_concurrency_slot("scarce", storage.run_id, "other")
    left = "\n".join(storage.check().left)
    assert "a slot of pool scarce" in left
    assert "in the line of pool scarce" in left


def test_keys_and_entries_that_nobody_reads_are_left(
    storage: Storage, redis_client: redis.Redis
) -> None:
    keys = Keys("dep")
    assert not storage.check(broker=redis_client, deployment="dep").left
    redis_client.hset(keys.lease("local", "e1"), "token", "t")
    redis_client.xadd(keys.reports("local", 3), {"r": "x"})
    redis_client.xadd(keys.runs(1), {"run_id": "x"})
    redis_client.zadd(keys.ready("local"), {"e1": 1})
    redis_client.set(keys.worker("local", "w"), "not looked at")
    left = "\n".join(storage.check(broker=redis_client, deployment="dep").left)
    for part in ("lease:e1 is left", "left in reports:3", "left in runs:1", "left in the queue"):
        assert part in left
