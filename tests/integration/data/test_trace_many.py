"""A-52 with thousands of files: alike ones are one line and one box, and the executions are always there."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from tests.integration.data.test_trace import Story, ident
from valohai_agent.protocol import utcnow
from valohai_dagster.cli.data import app
from valohai_dagster.cli.trace import lines_of
from valohai_dagster.data.trace import Trace, trace
from valohai_dagster.data.trace_folding import cut, fold
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings

MANY = 2000


def number(kind: int, n: int) -> str:
    return f"{kind:08d}-0000-4000-8000-{n:012d}"


@pytest.fixture
def story(settings: Settings) -> Iterator[Story]:
    """table.csv -> many #4 -> 2,000 files -> consume #5, which reads 20 of a bucket, too -> copy.txt and 2,000 files."""
    records = open_records(settings)
    story = Story(records)
    with records.write() as conn:
        story.execution(conn, "e4", 4, "many")
        story.execution(conn, "e5", 5, "consume")
        story.reads(conn, "e4", "seed", datum="table.csv")
        story.datum(conn, "copy.txt", "e5")
        files = [
            {
                "id": number(kind, n),
                "name": f"{'o' if kind == 4 else 'p'}{n}.txt",
                "size": 100,
                "store": "local",
                "key": f"{kind}/{n}",
                "project_id": "p",
                "execution_id": f"e{kind}",
                "ctime": utcnow(),
            }
            for kind in (4, 5)
            for n in range(MANY)
        ]
        conn.execute(t.datums.insert(), files)
        read = [
            {
                "execution_id": "e5",
                "file_id": str(n),
                "input": "files",
                "name": f"o{n}.txt",
                "uri": f"datum://{number(4, n)}",
                "datum_id": number(4, n),
            }
            for n in range(MANY)
        ]
        conn.execute(t.execution_inputs.insert(), read)
        for n in range(20):
            values = {"execution_id": "e5", "file_id": f"x{n}", "input": "raw", "name": str(n)}
            more = {"uri": f"s3://bucket/raw/{n}.csv", "size": 10, "version": str(n)}
            conn.execute(t.execution_inputs.insert().values(**values, **more))
    yield story
    records.close()


def titles(found: Trace) -> list[str]:
    return sorted(node.title for node in found.nodes.values())


def test_a52_the_producer_of_two_thousand_inputs_is_shown(story: Story) -> None:
    found = cut(fold(story.trace("copy.txt")))
    assert titles(found) == [
        "2,000 files", "20 files", "consume #5", "copy.txt", "many #4", "prep #1", "raw.csv", "table.csv",
    ]  # fmt: skip
    (files,) = (node for node in found.nodes.values() if node.kind == "files")
    assert files.count == MANY
    assert files.facts == {"names": ["o0.txt", "o1.txt", "o2.txt"], "size": 100 * MANY}
    (sources,) = (node for node in found.nodes.values() if node.kind == "sources")
    assert (sources.facts["uri"], sources.facts["size"]) == ("s3://bucket/raw/", 200)
    assert not found.truncated
    lines = lines_of(found, up=True, down=False)
    assert "      files: 2,000 files (200.0 kB: o0.txt, o1.txt, o2.txt, ...)" in lines
    assert "        many #4 (complete, commit c0ffee1234567, run run-e4)" in lines
    assert "      raw: 20 files of s3://bucket/raw/ (200 B: 0.csv, 1.csv, 2.csv, ...)" in lines
    assert "--all names each" in lines[-1]


def test_a52_the_traced_file_stays_apart_from_its_like(story: Story) -> None:
    with story.records.read() as conn:
        found = cut(fold(trace(conn, [f"file:{number(4, 7)}"])))
    assert {"o7.txt", "consume #5", "many #4"} <= set(titles(found))
    assert [node.count for node in found.nodes.values() if node.kind == "files"] == [MANY + 1]
    assert f"file:{number(4, 7)}" in found.nodes


def test_a52_what_is_left_out_is_the_farthest_and_is_counted(story: Story) -> None:
    whole = story.trace("copy.txt")
    found = cut(whole)
    assert len(found.nodes) == 400
    assert found.left_out == len(whole.nodes) - 400
    assert {"copy.txt", "consume #5"} <= set(titles(found))
    read = story.trace("copy.txt", most=50)
    assert {"many #4", "consume #5"} <= set(titles(read))
    assert read.left_out > MANY - 50
    assert "not shown" in lines_of(cut(fold(read)), up=True, down=True)[-1]


def test_few_files_and_those_with_an_alias_are_named(story: Story) -> None:
    found = story.trace("model.pkl")
    assert fold(found).nodes == found.nodes


def test_the_command_folds_and_all_names_each(
    story: Story, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALOHAI_STATE", str(settings.state_dir))
    folded = CliRunner().invoke(app, ["trace", "copy.txt", "--json"])
    assert folded.exit_code == 0, folded.output
    counts = {node["title"]: node["count"] for node in json.loads(folded.output)["nodes"]}
    assert (counts["2,000 files"], counts["copy.txt"]) == (MANY, 1)
    every = json.loads(CliRunner().invoke(app, ["trace", "copy.txt", "--all", "--json"]).output)
    assert f"file:{number(4, 1999)}" in {node["key"] for node in every["nodes"]}
    assert not every["truncated"]
    lines = CliRunner().invoke(app, ["trace", ident("copy.txt"), "--all"]).output.splitlines()
    assert len(lines) > MANY
    assert any("o1999.txt" in line for line in lines)
