"""How much a driven run leaves in the event log."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.integration.plugin.driver.yamls import ONE
from tests.support.conductor import ConductorSide
from tests.support.dagster_side import Ask, Code
from tests.support.redis_server import RedisServer
from tests.support.sim_worker import Play
from valohai_agent import protocol as p

ROOT = Path(__file__).resolve().parents[4]
MOST_ROWS = 14  # of a run with one step


def chatty() -> Play:
    """A long story: metadata, every phase with its progress, several files."""
    phases = [p.Phase.preparing, p.Phase.pulling, p.Phase.downloading]
    return Play(
        phases=phases,
        metadata=[{"loss": 1 / n} for n in range(1, 60)],
        outputs={f"model-{n}.bin": b"x" for n in range(5)},
    )


def rows(side: ConductorSide, run_id: str) -> list[str]:
    """Every row of the run's event log, log lines included."""
    records = side.instance.get_records_for_run(run_id, limit=1000).records
    entries = [record.event_log_entry for record in records]
    return [
        f"{entry.dagster_event.event_type_value if entry.dagster_event else 'line'}: {entry.message}"
        for entry in entries
    ]


def test_a_run_of_one_step_has_few_rows(tmp_path: Path, redis_server: RedisServer) -> None:
    """With the queue, launcher and log manager of the dagster.yaml that we ship."""
    shipped = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    code = Code.write(tmp_path / "code", ONE)
    plays = {"prep": chatty()}
    with ConductorSide(tmp_path / "side", code, plays, redis_server, **shipped) as side:
        run = side.create(Ask(assets=["prep"]))
        side.submit(run)
        assert side.ended(run.run_id).is_success
        found = rows(side, run.run_id)
    assert len(found) <= MOST_ROWS, "\n".join(found)


def test_further_tries_of_a_download_and_cache_hits_are_told(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    told = ["downloading, f: no answer (try 1 of 3)", "inputs: 12 files, 3 from cache"]
    code = Code.write(tmp_path / "code", ONE)
    plays = {"prep": Play(phases=[p.Phase.downloading], retried=[*told, told[0]])}
    with ConductorSide(tmp_path / "side", code, plays, redis_server) as side:
        run = side.create(Ask(assets=["prep"]))
        side.submit(run)
        assert side.ended(run.run_id).is_success
        found = [row.partition(": ")[2] for row in rows(side, run.run_id)]
    assert [text for text in found if text in ("downloading", *told)] == ["downloading", *told]
