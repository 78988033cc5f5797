"""What steps took from outside, and from files that a launch named: the provenance says what was really used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import AssetKey, AssetRecordsFilter
from dagster._core.definitions.observe import observe as observe_now

from tests.integration.plugin.driver.conftest import Case, Comparison
from tests.integration.plugin.driver.seen import kinds, stale, status
from tests.integration.plugin.driver.test_a_run_in_numbers import MOST_ROWS, rows
from tests.integration.plugin.driver.yamls import CHAIN
from tests.support.conductor import ConductorSide
from tests.support.dagster_side import Ask, Code, Side, key_of
from tests.support.redis_server import RedisServer
from tests.support.sim_worker import Play
from valohai_agent.protocol import utcnow
from valohai_dagster import load_valohai_project
from valohai_dagster.data.aliases import set_alias
from valohai_dagster.data.datums import list_datums
from valohai_dagster.plugin.compat import DATA_VERSION_TAG, get_input_data_version_tag

OUTSIDE = """
- step:
    name: prep
    image: python:3.11
    command: python prep.py
    inputs:
      - {name: table, default: "store://local/raw/table.csv"}
      - {name: pictures, default: "store://local/pictures/*.png"}
"""
URI = "store://local/raw/table.csv"
TABLE = AssetKey(["digits", "external", "store", "local", "raw", "table_csv"])
PICTURES = AssetKey(["digits", "external", "store", "local", "pictures_any_png"])


def put(side: Side, name: str, content: bytes, time: int) -> None:
    """A file of the store `local` with that time, so that both sides see one version."""
    path = side.root / "state" / "store" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(time, time))


def observe(side: Side) -> None:
    """What the Observe button does, in this process. Everything is observed that can be, the rest is named."""
    loaded = load_valohai_project(side.code.yaml.parent).assets or ()
    sources = [one for one in loaded if isinstance(one, dg.AssetsDefinition) and one.is_observable]
    assert observe_now(sources, instance=side.instance).success


def used(side: Side, key: AssetKey, step: str = "prep") -> str | None:
    """The version of that source in the provenance of the step's newest materialization."""
    wanted = AssetRecordsFilter(asset_key=key_of(step))
    record = side.instance.fetch_materializations(wanted, limit=1).records[0]
    materialization = record.asset_materialization
    assert materialization is not None
    return (materialization.tags or {}).get(get_input_data_version_tag(key))


def observed(side: Side, key: AssetKey) -> list[str]:
    """Versions of the source's observations, oldest first."""
    records = side.instance.fetch_observations(key, limit=100).records
    found = [record.asset_observation for record in reversed(records)]
    return [(one.tags or {})[DATA_VERSION_TAG] for one in found if one is not None]


def test_what_was_used_is_what_provenance_says(same: Comparison) -> None:
    """First use without an observation; then content that changed behind the last observation; then nothing new."""
    versions: dict[str, list[Any]] = {}

    def scenario(side: Side) -> None:
        put(side, "raw/table.csv", b"one", 1_000)
        put(side, "pictures/a.png", b"a", 1_000)
        side.run(Ask(assets=["prep"]))
        first = (used(side, TABLE), used(side, PICTURES))
        put(side, "raw/table.csv", b"two!", 2_000)
        side.run(Ask(assets=["prep"]))
        side.run(Ask(assets=["prep"]))
        versions[side.name] = [first, observed(side, TABLE), len(observed(side, PICTURES))]
        assert used(side, TABLE) == "4-2000"

    seen = same(Case(yaml=OUTSIDE, scenario=scenario, plays={"prep": Play(versions={})}))
    assert [status(seen, run) for run in range(3)] == ["SUCCESS"] * 3
    assert [kinds(seen, "prep", run).count("ASSET_OBSERVATION") for run in range(3)] == [2, 1, 0]
    assert versions["engine"] == versions["conductor"]
    (first_table, first_pictures), tables, pictures = versions["engine"]
    assert (first_table, tables, pictures) == ("3-1000", ["3-1000", "4-2000"], 1)
    assert first_pictures != "1-1000"  # a digest of the listing
    assert stale(seen) == {"prep": "FRESH"}


def test_an_observation_before_the_run_is_what_it_depends_on(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        put(side, "raw/table.csv", b"one", 1_000)
        put(side, "pictures/a.png", b"a", 1_000)
        observe(side)
        side.run(Ask(assets=["prep"]))
        assert (observed(side, TABLE), used(side, TABLE)) == (["3-1000"], "3-1000")
        put(side, "raw/table.csv", b"two!", 2_000)
        put(side, "pictures/b.png", b"b", 2_000)
        observe(side)
        assert side.staleness() == {"prep": "STALE"}

    seen = same(Case(yaml=OUTSIDE, scenario=scenario, plays={"prep": Play(versions={})}))
    assert kinds(seen, "prep").count("ASSET_OBSERVATION") == 0
    assert stale(seen) == {"prep": "STALE"}


def test_what_the_agent_met_counts_for_more_than_what_was_there_when_it_was_queued(
    same: Comparison,
) -> None:
    def scenario(side: Side) -> None:
        put(side, "raw/table.csv", b"one", 1_000)
        observe(side)
        side.run(Ask(assets=["prep"]))
        assert (used(side, TABLE), observed(side, TABLE)) == ("etag-2", ["3-1000", "etag-2"])

    plays = {"prep": Play(versions={URI: '"etag-2"'})}
    same(Case(yaml=ONE_SOURCE, scenario=scenario, plays=plays))


ONE_SOURCE = OUTSIDE.replace(
    '      - {name: pictures, default: "store://local/pictures/*.png"}\n',
    '      - {name: pictures, default: "store://local/pictures/*.png", optional: true}\n',
)


def test_a_newer_observation_is_not_overwritten_by_an_older_use(same: Comparison) -> None:
    """The content changed again, and was observed, while the execution ran with what it had downloaded."""

    def scenario(side: Side) -> None:
        put(side, "raw/table.csv", b"one", 1_000)
        observe(side)

        def change(_: Any) -> None:
            put(side, "raw/table.csv", b"two!", 2_000)
            observe(side)

        side.worker.plays["prep"] = Play(versions={}, while_running=change)
        side.run(Ask(assets=["prep"]))
        assert (used(side, TABLE), observed(side, TABLE)) == ("3-1000", ["3-1000", "4-2000"])
        assert side.staleness() == {"prep": "STALE"}

    same(Case(yaml=ONE_SOURCE, scenario=scenario))


def test_a_source_that_a_launch_replaces_was_not_used(same: Comparison) -> None:
    def scenario(side: Side) -> None:
        put(side, "raw/table.csv", b"one", 1_000)
        put(side, "raw/other.csv", b"other", 1_000)
        ops = {"digits__prep": {"config": {"inputs": {"table": ["store://local/raw/other.csv"]}}}}
        side.run(Ask(assets=["prep"], ops=ops))
        assert observed(side, TABLE) == []

    same(Case(yaml=ONE_SOURCE, scenario=scenario, plays={"prep": Play(versions={})}))


def test_an_upstream_file_that_a_launch_names_is_of_its_own_materialization(
    same: Comparison,
) -> None:
    """The launch takes the file of the first of two materializations; the asset is stale then."""

    def scenario(side: Side) -> None:
        side.worker.plays["prep"] = Play(outputs={"part.csv": b"first\n"})
        side.run(Ask(assets=["prep"]))
        with side.service.records.write() as connection:
            first = list_datums(connection)[0]
            assert first.project_id is not None
            set_alias(
                connection,
                project_id=first.project_id,
                name="first",
                datum_id=first.id,
                now=utcnow(),
            )
        version = newest_version(side, "prep")
        side.worker.plays["prep"] = Play(outputs={"part.csv": b"second\n"})
        side.run(Ask(assets=["prep"]))
        for uri in (first.uri, "datum://first"):
            side.run(Ask(assets=["train"]))
            assert side.staleness()["train"] == "FRESH"
            ops = {"digits__train": {"config": {"inputs": {"prep": [uri]}}}}
            side.run(Ask(assets=["train"], ops=ops))
            assert used(side, key_of("prep"), "train") == version
            assert side.staleness()["train"] == "STALE"

    seen = same(Case(yaml=CHAIN, scenario=scenario))
    assert stale(seen)["prep"] == "FRESH"


def newest_version(side: Side, step: str) -> str:
    wanted = AssetRecordsFilter(asset_key=key_of(step))
    record = side.instance.fetch_materializations(wanted, limit=1).records[0]
    materialization = record.asset_materialization
    assert materialization is not None
    return (materialization.tags or {})[DATA_VERSION_TAG]


def test_a_run_with_a_source_that_changed_has_few_rows(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    code = Code.write(tmp_path / "code", ONE_SOURCE)
    plays = {"prep": Play(versions={})}
    with ConductorSide(tmp_path / "side", code, plays, redis_server) as side:
        put(side, "raw/table.csv", b"one", 1_000)
        run = side.run(Ask(assets=["prep"]))
        assert len(rows(side, run.run_id)) <= MOST_ROWS
