"""A-52: from a file to what made it and to what uses it, over real records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from valohai_agent.protocol import utcnow
from valohai_dagster.cli.trace import lines_of, roots_of
from valohai_dagster.data.aliases import set_alias
from valohai_dagster.data.trace import Trace, trace
from valohai_dagster.data.trace_folding import cut
from valohai_dagster.data.trace_layout import place
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores, open_stores


def ident(text: str) -> str:
    """A datum id that tells which file it is."""
    return f"{text.encode().hex():0<8.8}-0000-4000-8000-000000000000"


class Story:
    """raw.csv from a bucket -> prep #1 -> table.csv -> train #2 -> model.pkl (alias best) -> evaluate #3 -> plot.png."""

    def __init__(self, records: Records) -> None:
        self.records = records
        with records.write() as conn:
            conn.execute(
                t.projects.insert().values(id="p", name="digits", counter=3, ctime=utcnow())
            )
            for number, step in enumerate(("prep", "train", "evaluate"), 1):
                self.execution(conn, f"e{number}", number, step)
            for name, maker in (("table.csv", "e1"), ("model.pkl", "e2"), ("plot.png", "e3")):
                self.datum(conn, name, maker)
            self.reads(conn, "e1", "raw", uri="s3://bucket/raw.csv", version="v1")
            self.reads(conn, "e2", "data", datum="table.csv")
            self.reads(conn, "e3", "model", datum="model.pkl")
            self.reads(conn, "e3", "test", datum="table.csv")
            set_alias(conn, project_id="p", name="best", datum_id=ident("model.pkl"), now=utcnow())
            named = {"id": "d", "project_id": "p", "name": "tables", "ctime": utcnow()}
            conn.execute(t.datasets.insert().values(**named))
            version = {"id": "v", "dataset_id": "d", "name": "2026", "state": "closed"}
            conn.execute(t.dataset_versions.insert().values(**version, ctime=utcnow()))
            conn.execute(
                t.dataset_files.insert().values(version_id="v", datum_id=ident("table.csv"))
            )

    @staticmethod
    def execution(conn: sa.Connection, name: str, counter: int, step: str) -> None:
        values = {"id": name, "project_id": "p", "counter": counter, "step": step, "image": "i"}
        more = {
            "commit": "c0ffee123456789",
            "group_name": "local",
            "spec": {},
            "run_id": f"run-{name}",
        }
        conn.execute(
            t.executions.insert().values(**values, **more, status="complete", ctime=utcnow())
        )

    @staticmethod
    def datum(conn: sa.Connection, name: str, maker: str | None, **values: Any) -> None:
        row = {
            "id": ident(name),
            "name": name,
            "size": 1234,
            "store": "local",
            "key": f"data/{name}",
        }
        more = {"project_id": "p", "execution_id": maker, "ctime": utcnow(), "sha256": name[0] * 64}
        conn.execute(t.datums.insert().values(**{**row, **more, **values}))

    @staticmethod
    def reads(
        conn: sa.Connection,
        execution: str,
        name: str,
        *,
        datum: str | None = None,
        uri: str = "",
        version: str | None = None,
    ) -> None:
        where = {
            "uri": uri or f"datum://{ident(datum or '')}",
            "datum_id": ident(datum) if datum else None,
        }
        row = {"execution_id": execution, "file_id": name, "input": name, "name": "file"}
        conn.execute(t.execution_inputs.insert().values(**row, **where, version=version))

    def trace(self, *names: str, **options: Any) -> Trace:
        with self.records.read() as conn:
            return trace(conn, [f"file:{ident(name)}" for name in names], **options)


@pytest.fixture
def story(settings: Settings) -> Iterator[Story]:
    records = open_records(settings)
    yield Story(records)
    records.close()


@pytest.fixture
def stores(settings: Settings) -> Stores:
    return open_stores(settings)


def titles(found: Trace) -> set[str]:
    return {node.title for node in found.nodes.values()}


def test_a52_up_to_the_execution_its_commit_and_its_inputs(story: Story) -> None:
    found = story.trace("model.pkl", down=False)
    assert titles(found) == {"model.pkl", "train #2", "table.csv", "prep #1", "raw.csv"}
    assert found.nodes["execution:e2"].facts["commit"] == "c0ffee123456789"
    outside = next(node for node in found.nodes.values() if node.kind == "outside")
    assert (outside.facts["uri"], outside.facts["version"]) == ("s3://bucket/raw.csv", "v1")
    edges = {(edge.source.partition(":")[0], edge.label) for edge in found.edges}
    assert edges == {("execution", ""), ("file", "data"), ("outside", "raw")}


def test_a52_down_to_all_consumers_and_what_names_it(story: Story) -> None:
    found = story.trace("table.csv", up=False)
    assert titles(found) == {
        "table.csv",
        "train #2",
        "model.pkl",
        "evaluate #3",
        "plot.png",
        "tables/2026",
    }


def test_depth_and_size_are_bounded_and_said(story: Story) -> None:
    near = story.trace("plot.png", down=False, depth=1)
    assert titles(near) == {"plot.png", "evaluate #3", "model.pkl", "table.csv"}
    assert near.truncated
    few = cut(story.trace("table.csv"), 3)
    assert [node.kind for node in few.nodes.values()] == ["file", "execution", "execution"]
    assert few.truncated
    assert few.left_out == len(story.trace("table.csv").nodes) - 3
    assert not story.trace("table.csv").truncated


def test_a_cycle_in_the_records_ends(story: Story) -> None:
    with story.records.write() as conn:
        story.reads(conn, "e1", "loop", datum="plot.png")
    found = story.trace("table.csv")
    assert len(found.nodes) == 8
    assert set(place(found).places) == set(found.nodes)


def test_everything_stands_left_of_what_came_of_it(story: Story) -> None:
    found = story.trace("table.csv")
    places = place(found).places
    for edge in found.edges:
        assert places[edge.source].column < places[edge.target].column
    assert len(set(places.values())) == len(found.nodes)


def test_an_edge_over_several_columns_has_room_in_each(story: Story) -> None:
    """The table goes into the evaluation too, past the training and its model."""
    layout = place(story.trace("table.csv"))
    (way,) = layout.routes.values()
    assert [stop.column for stop in way] == [3, 4]
    assert not {*way} & {*layout.places.values()}


@pytest.mark.parametrize(
    "what",
    [
        f"datum://{ident('model.pkl')}",
        ident("model.pkl"),
        ident("model.pkl")[:8],
        "best",
        "datum://best",
        "model.pkl",
        "m" * 64,
        "store://local/data/model.pkl",
    ],
)
def test_a_file_is_found_by_all_its_names(story: Story, stores: Stores, what: str) -> None:
    with story.records.read() as conn:
        assert roots_of(conn, what, stores=stores) == [f"file:{ident('model.pkl')}"]


def test_what_read_an_object_before_it_was_adopted_is_found_too(
    story: Story, stores: Stores
) -> None:
    uri = "store://local/in/a.csv"
    with story.records.write() as conn:
        story.reads(conn, "e2", "extra", uri=uri, version="v1")
        story.datum(conn, "a.csv", None, key="in/a.csv", adopted=True)
    with story.records.read() as conn:
        assert roots_of(conn, uri, stores=stores) == [f"file:{ident('a.csv')}", "execution:e2"]


def test_other_things_are_found_too_and_what_is_not_is_said(story: Story, stores: Stores) -> None:
    with story.records.read() as conn:
        assert roots_of(conn, "digits#2", stores=stores) == ["execution:e2"]
        assert roots_of(conn, "s3://bucket/raw.csv", stores=stores) == ["execution:e1"]
        for what in ("nothing-here", "datum://nobody", "s3://bucket/other.csv"):
            with pytest.raises(NotFoundError, match=what):
                roots_of(conn, what, stores=stores)


def test_an_alias_of_two_projects_needs_the_project(story: Story, stores: Stores) -> None:
    with story.records.write() as conn:
        conn.execute(t.projects.insert().values(id="q", name="other", counter=0, ctime=utcnow()))
        set_alias(conn, project_id="q", name="best", datum_id=ident("plot.png"), now=utcnow())
    with story.records.read() as conn:
        with pytest.raises(RefusedError, match="several projects"):
            roots_of(conn, "best", stores=stores)
        assert roots_of(conn, "best", stores=stores, project="other") == [
            f"file:{ident('plot.png')}"
        ]


def test_the_text_unfolds_everything_once(story: Story) -> None:
    lines = lines_of(story.trace("model.pkl"), up=True, down=True)
    text = "\n".join(lines)
    assert lines[0].startswith("model.pkl (1.2 kB, datum://")
    assert "alias best" in lines[0]
    assert "    train #2 (complete, commit c0ffee1234567, run run-e2)" in lines
    assert "raw: s3://bucket/raw.csv (v1)" in text
    assert "    model: evaluate #3" in text
    assert text.count("commit") == 3


def test_the_command_prints_json(
    story: Story, settings: Settings, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valohai_dagster.cli.data import app

    monkeypatch.setenv("VALOHAI_STATE", str(settings.state_dir))
    done = CliRunner().invoke(app, ["trace", "best", "--up", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["roots"] == [f"file:{ident('model.pkl')}"]
    assert {node["kind"] for node in found["nodes"]} == {"file", "execution", "outside"}
