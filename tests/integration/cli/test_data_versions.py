"""`valohai-dagster data`: datasets, models, aliases, tags, purging and adoption as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from valohai_dagster.cli import data, data_files, transfer_batch
from valohai_dagster.cli.app import app as root
from valohai_dagster.cli.data_place import now
from valohai_dagster.data import transfers
from valohai_dagster.errors import NotFoundError, RefusedError, StoreError
from valohai_dagster.records import tables
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings

RUNNER = CliRunner()


def run(*arguments: str, code: int = 0) -> Result:
    """Runs one command; our own errors come out as they are."""
    result = RUNNER.invoke(data.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def loads(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def put(name: str, content: str = "x", *options: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(content)
    return run("put", name, "-p", "demo", *options).stdout.split()[0]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_t16_a_directory_becomes_a_dataset_version_and_comes_back() -> None:
    for name in ("set/a.txt", "set/sub/b.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    done = run("put", "set", "-p", "demo", "--dataset", "faces/v1")
    assert done.stdout.splitlines()[-1] == "dataset://faces/v1"
    assert "the project 'demo' is new" in done.stderr
    assert {item["name"] for item in loads("ls", "dataset://faces/v1")} == {"a.txt", "sub/b.txt"}
    assert len(loads("ls", "*.txt", "--dataset", "faces/latest")) == 2
    run("get", "dataset://faces/v1", "-o", "out")
    assert Path("out/sub/b.txt").read_text() == "set/sub/b.txt"
    (out,) = loads("get", "datum://" + loads("ls", "a.txt")[0]["id"], "-o", "one.txt")
    assert out["path"] == "one.txt"
    (out,) = loads("get", "a.*", "-o", "many")
    assert out["path"] == "many/a.txt", "a pattern may mean several files, so it is a directory"
    with pytest.raises(RefusedError, match="versions never change"):
        run("put", "set", "-p", "demo", "--dataset", "faces/v1")
    assert len(loads("ls")) == 2, "nothing is uploaded for a version that cannot be made"


def test_o24_datasets_have_versions_aliases_and_properties() -> None:
    uri = put("a")
    run("datasets", "create", "faces", "-p", "demo", "--property", "owner=me")
    for version in ("v1", "v2"):
        run("datasets", "create", f"faces/{version}", uri, "--tag", "t", "--property", "rows=5")
    run("datasets", "alias", "set", "best", "faces/v1")
    run("datasets", "alias", "set", "best", "faces/v2")
    moves = loads("datasets", "alias", "history", "faces/best")
    assert [move["uri"] for move in moves] == ["dataset://faces/v1", "dataset://faces/v2"]
    shown = loads("datasets", "show", "faces")
    assert shown["properties"] == {"owner": "me"}
    newest = next(version for version in shown["versions"] if version["name"] == "v2")
    assert (newest["aliases"], newest["tags"], newest["properties"]) == (
        ["best"],
        ["t"],
        {"rows": 5},
    )
    run("datasets", "properties", "faces/v2", "rows=null", 'note={"a": 1}')
    found = loads("datasets", "show", "faces/best")
    assert found["properties"] == {"note": {"a": 1}}
    assert [file["uri"] for file in found["files"]] == [uri]
    (listed,) = loads("datasets", "ls")
    assert (sorted(listed["versions"]), listed["aliases"]) == (["v1", "v2"], ["best"])
    for arguments in (("ls",), ("show", "faces"), ("show", "faces/v1")):
        assert "faces" in run("datasets", *arguments).stdout or arguments[-1] == "faces"
    run("datasets", "alias", "rm", "faces/best")
    with pytest.raises(NotFoundError, match="no alias 'best'"):
        run("datasets", "alias", "rm", "faces/best")


def test_a_list_that_is_cut_says_how_many_are_left() -> None:
    put("a.txt")
    put("b.txt")
    put("c.txt")
    result = run("ls", "--limit", "2")
    assert "1 more; --limit 3 shows them too" in result.stderr
    assert "a.txt" not in result.stdout
    assert "more" not in run("ls", "--limit", "3").stderr
    assert len(loads("ls", "--limit", "1")) == 1


def test_t17_models_are_numbered_approved_and_described() -> None:
    uri = put("weights")
    for note in ("first", "second"):
        run("models", "create", "net", uri, "--note", note)
    with pytest.raises(NotFoundError, match="is approved"):
        run("models", "show", "net/latest")
    run("models", "approve", "net/1")
    assert loads("models", "show", "net/latest")["number"] == 1
    run("models", "approve", "model://net/2")
    run("models", "reject", "net/2")
    run("models", "note", "net/1", "better")
    run("models", "tag", "net/1", "small", "fast")
    one = loads("models", "show", "net/1")
    assert (one["status"], one["release_note"], one["tags"]) == (
        "approved",
        "better",
        ["small", "fast"],
    )
    assert [file["uri"] for file in one["files"]] == [uri]
    assert [v["status"] for v in loads("models", "show", "net")["versions"]] == [
        "rejected",
        "approved",
    ]
    (listed,) = loads("models", "ls")
    assert (listed["versions"], listed["newest"], listed["latest_approved"]) == (2, 2, 1)
    run("get", "model://net/latest", "-o", "w")
    assert next(Path("w").iterdir()).read_text() == "x"
    for arguments in (("ls",), ("show", "net"), ("show", "net/1")):
        assert run("models", *arguments).stdout


def test_o25_aliases_and_tags_change_later() -> None:
    first, second = put("a", "1"), put("b", "2")
    run("alias", "set", "best", first)
    run("alias", "set", "best", second)
    assert [move["uri"] for move in loads("alias", "history", "best")] == [first, second]
    (listed,) = loads("alias", "ls")
    assert (listed["name"], listed["uri"], listed["file"]) == ("best", second, "b")
    assert "best" in run("alias", "ls").stdout
    run("tag", "add", "good", "best", first)
    assert {item["name"] for item in loads("ls", "--tag", "good")} == {"a", "b"}
    run("tag", "remove", "good", "*")
    assert loads("ls", "--tag", "good") == []
    run("alias", "rm", "best")
    with pytest.raises(NotFoundError, match="no alias 'best'"):
        run("alias", "history", "best")


def test_put_keeps_metadata_and_properties() -> None:
    Path("m.json").write_text('{"color": "red"}')
    uri = put("a", "1", "--metadata", "@m.json", "--property", "rows=5", "--property", "by=me")
    (found,) = loads("info", uri)
    assert found["metadata"] == {"color": "red"}
    assert found["properties"] == {"rows": 5, "by": "me"}
    assert found["project"] == "demo"
    run("tag", "add", "good", uri)
    run("tag", "add", "new", uri)
    assert run("tag", "add", "new", uri).stdout == "1 file changed\n"
    text = run("info", uri).stdout
    lines = dict(line.split(None, 1) for line in text.splitlines() if line)
    assert lines["metadata"] == '{"color": "red"}'
    assert lines["tags"] == "good, new"
    assert lines["size"] == "1 B"
    assert "'" not in text


def test_names_with_wildcards_mean_the_newest_of_each() -> None:
    put("a.txt", "old")
    new = put("a.txt", "new")
    put("b.txt", "b")
    Path("out").mkdir()
    run("get", "*.txt", "-o", "out")
    assert {path.name: path.read_text() for path in Path("out").iterdir()} == {
        "a.txt": "new",
        "b.txt": "b",
    }
    assert loads("info", "a*")[0]["uri"] == new


def test_o20_rm_deletes_the_content_and_keeps_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put("a", "1")
    with pytest.raises(RefusedError, match=r"1 file \(1 B\).* --yes"):
        run("rm", uri)
    run("datasets", "create", "d/v", uri)
    with pytest.raises(RefusedError, match=r"is in dataset://d/v.*--force"):
        run("rm", uri, "--yes")
    run("rm", uri, "--yes", "--force")
    (found,) = loads("info", uri)
    assert found["purged"]
    assert loads("ls") == []
    assert len(loads("ls", "--purged")) == 1
    with pytest.raises(RefusedError, match="was purged"):
        run("get", uri)


@pytest.mark.parametrize("status", ["created", "queued", "started"])
def test_what_an_execution_reads_that_has_not_ended_is_not_removed(status: str) -> None:
    uri = put("a", "1")
    records = open_records(load_settings())
    row = {"counter": 3, "step": "train", "commit": "c", "group_name": "local", "image": "i"}
    read = {"execution_id": "e", "file_id": "f", "input": "data", "name": "a", "uri": uri}
    with records.write() as connection:
        project = connection.execute(sa.select(tables.projects.c.id)).scalar_one()
        connection.execute(
            tables.executions.insert().values(
                id="e", project_id=project, status=status, spec={}, ctime=now(), **row
            )
        )
        connection.execute(
            tables.execution_inputs.insert().values(**read, datum_id=uri.removeprefix("datum://"))
        )
    with pytest.raises(RefusedError, match=rf"is an input of train #3 \({status}\).*--force"):
        run("rm", uri, "--yes")
    with records.write() as connection:
        connection.execute(tables.executions.update().values(status="complete", ended_at=now()))
    records.close()
    run("rm", uri, "--yes")
    assert loads("info", uri)[0]["purged"]


def test_i40_files_of_the_product_itself_are_not_adopted(tmp_path: Path) -> None:
    root = tmp_path / "state" / "store"
    uri = put("a", "1")
    log = "logs/0b5f9a4e-1111-4222-8333-444455556666/0b5f9a4e-1111-4222-8333-444455556666/1/stdout"
    (root / log).parent.mkdir(parents=True)
    (root / log).write_text("hello")
    result = run("adopt", "store://local/**", "-p", "demo", "--json", code=1)
    answer = json.loads(result.stdout)
    assert [known["id"] for known in answer["existing"].values()] == [uri.removeprefix("datum://")]
    result = run("adopt", f"store://local/{log}", "-p", "demo", "--alias", "y", "--json", code=1)
    answer = json.loads(result.stdout)
    assert (answer["ok"], answer["created"], answer["existing"]) == (False, {}, {})
    assert answer["problems"][0]["code"] == "adoptable_file_is_ours"


def test_i40_objects_are_adopted_where_they_are(tmp_path: Path) -> None:
    root = tmp_path / "state" / "store"
    for name in ("raw/2026/a.csv", "raw/2026/b.csv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    made = loads("adopt", "store://local/raw/**.csv", "-p", "demo", "--tag", "raw")
    assert made["ok"]
    assert sorted(made["created"]) == [
        "store://local/raw/2026/a.csv",
        "store://local/raw/2026/b.csv",
    ]
    listed = {item["name"]: item for item in loads("ls", "--tag", "raw")}
    assert set(listed) == {"2026/a.csv", "2026/b.csv"}
    assert listed["2026/a.csv"]["adopted"]
    assert listed["2026/a.csv"]["sha256"] is None
    again = loads("adopt", "store://local/raw/2026/a.csv", "-p", "demo")
    ident = made["created"]["store://local/raw/2026/a.csv"]
    assert again["created"] == {}
    assert again["existing"] == {"store://local/raw/2026/a.csv": {"id": ident, "project": "demo"}}
    assert "exists already in project demo" in run("adopt", "store://local/raw/2026/a.csv").stdout
    run("rm", ident, "--yes")
    assert (root / "raw/2026/a.csv").exists(), "adopted content belongs to somebody else"
    run("rm", listed["2026/b.csv"]["id"], "--yes", "--delete-adopted")
    assert not (root / "raw/2026/b.csv").exists()


def test_i40_what_is_missing_has_its_code_and_the_others_are_adopted(tmp_path: Path) -> None:
    root = tmp_path / "state" / "store"
    (root / "raw").mkdir(parents=True)
    (root / "raw" / "a").write_text("12345")
    arguments = ("store://local/raw/a", "store://local/raw/no", "store://local/no/*", "s3://b/k")
    result = run("adopt", *arguments, "--checksum", "--json", code=1)
    answer = json.loads(result.stdout)
    assert list(answer["created"]) == ["store://local/raw/a"]
    assert [problem["code"] for problem in answer["problems"]] == [
        "adoptable_file_not_found",
        "adoptable_file_not_found",
        None,
    ]
    assert 'kind = "s3", bucket = "b"' in answer["problems"][2]["message"]
    (found,) = loads("ls")
    assert len(found["sha256"]) == 64
    named = "store://local/raw/a"
    run("rm", found["id"], "--yes")
    made = loads("adopt", named, "-p", "demo", "--name", "x/y", "--alias", "raw")["created"]
    assert loads("info", "raw")[0]["id"] == made[named]
    assert loads("info", "raw")[0]["name"] == "x/y"
    with pytest.raises(RefusedError, match="need exactly one object"):
        run("adopt", "store://local/no/*", "--name", "x")


def test_an_interrupted_put_leaves_whole_datums_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        Path("set").mkdir(exist_ok=True)
        Path(f"set/{number}").write_text(str(number))
    real, begun = transfers.store_file, []

    def store_file(path: Path, **values: Any) -> Any:
        begun.append(path)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(path, **values)

    monkeypatch.setattr(data_files.transfers, "store_file", store_file)
    monkeypatch.setattr(transfer_batch, "WORKERS", 1)
    result = RUNNER.invoke(data.app, ["put", "set", "-p", "demo", "--dataset", "d/v"])
    assert result.exit_code != 0
    stored = loads("ls")
    assert 2 <= len(stored) < 5
    assert f"stored as datums: {len(stored)} files" in result.stderr
    assert loads("datasets", "ls") == []
    root = Path("state/store/data")
    assert len([path for path in root.rglob("*") if path.is_file()]) == len(stored)


def test_an_interrupted_put_of_one_file_says_that_nothing_was_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def store_file(path: Path, **values: Any) -> Any:
        raise KeyboardInterrupt

    Path("a").write_text("a")
    monkeypatch.setattr(data_files.transfers, "store_file", store_file)
    result = RUNNER.invoke(data.app, ["put", "a"])
    assert result.exit_code == 130
    assert "put was interrupted; nothing was stored" in result.stderr
    assert loads("ls") == []


def test_a_failed_download_leaves_nothing_half(tmp_path: Path) -> None:
    uri = put("a", "content")
    key = loads("info", uri)[0]["key"]
    (tmp_path / "state" / "store" / key).write_text("damaged")
    with pytest.raises(StoreError, match=r"has sha256 .* expected"):
        run("get", uri, "-o", "out/a")
    assert list(Path("out").iterdir()) == []


def test_bad_requests_say_what_is_wrong() -> None:
    uri = put("a")
    put("b")
    wrong: list[tuple[tuple[str, ...], str]] = [
        (("put", "a", "--metadata", "[1]", "-p", "demo"), "must be a JSON object"),
        (("put", "a", "--metadata", "{", "-p", "demo"), "is not JSON"),
        (("put", "a", "--metadata", "@no", "-p", "demo"), "cannot read no"),
        (("put", "a", "--property", "x", "-p", "demo"), "not of the form NAME=VALUE"),
        (
            ("put", "a", "--dataset", "d", "-p", "demo"),
            r"--dataset d: .* such as --dataset d/first",
        ),
        (("put", "a", "--alias", "a/b", "-p", "demo"), "must not contain / or"),
        (("alias", "set", "a/b", uri), "must not contain / or"),
        (("put", "a", "--dataset", "d/latest", "-p", "demo"), "always means the newest"),
        (("get", "none-*"), "no datum has a name like"),
        (("get", "dataset://d/v"), "no dataset 'd'"),
        (("alias", "set", "x", "*"), "names 2 files"),
        (("tag", "add", " ", uri), "is no tag"),
        (("datasets", "show", "none"), "no dataset 'none'"),
        (("models", "approve", "none/1"), "no model 'none'"),
    ]
    for arguments, expected in wrong:
        with pytest.raises(RefusedError, match=expected):
            run(*arguments)
    Path("c").write_text("c")
    run("put", "c", "-p", "other")
    with pytest.raises(
        RefusedError, match="name the project with --project; known are demo, other"
    ):
        run("datasets", "create", "d")


def test_a_plain_name_means_the_file_wherever_files_are_named() -> None:
    uri = put("img.txt")
    for reference in ("img.txt", "datum://img.txt", uri[8:18]):
        assert loads("info", reference)[0]["uri"] == uri
    run("alias", "set", "best", "img.txt")
    run("tag", "add", "small", "img.txt")
    run("datasets", "create", "faces/v1", "img.txt")
    run("get", "img.txt", "-o", "copy.txt")
    assert Path("copy.txt").read_text() == "x"
    assert loads("info", "best")[0]["tags"] == ["small"]
    with pytest.raises(NotFoundError, match=r"img: this project has no datum of this id, alias"):
        run("info", "img")
    assert loads("info", "img.txt")[0]["name"] == "img.txt"


def test_a_name_of_several_files_is_refused_with_their_ids() -> None:
    one, other = put("a.txt", "1"), put("a.txt", "2")
    put("A.txt", "3")
    with pytest.raises(RefusedError, match=r"several files fit .*; say which one") as caught:
        run("rm", "a.txt", "--yes")
    assert one in str(caught.value)
    assert other in str(caught.value)
    assert str(caught.value).count("datum://") == 2, "names are told apart by their letters' case"
    run("rm", one, "--yes")
    run("rm", "a.txt", "--yes")
    with pytest.raises(RefusedError, match="several files"):
        run("info", "a.txt")
    assert [file["name"] for file in loads("ls", "a.txt")] == ["A.txt"]


def test_an_alias_goes_before_a_name_of_that_kind() -> None:
    named, other = put("best"), put("other.txt")
    assert loads("info", "best")[0]["uri"] == named
    run("alias", "set", "best", other)
    assert loads("info", "best")[0]["uri"] == other


def test_with_a_second_project_messages_say_how_and_where() -> None:
    uri = put("a.txt")
    run("alias", "set", "best", uri)
    run("datasets", "create", "faces/v1", uri)
    Path("b.txt").write_text("b")
    run("put", "b.txt", "-p", "slip")
    where = r"with --project NAME: known are demo, slip; '{}' is in demo"
    with pytest.raises(NotFoundError, match=where.format("best")):
        run("info", "best")
    with pytest.raises(NotFoundError, match=where.format("faces")):
        run("get", "dataset://faces/v1")
    assert loads("info", "a.txt")[0]["uri"] == uri, "a name that there is once needs no project"
    assert loads("info", "best", "-p", "demo")[0]["uri"] == uri
    listed = RUNNER.invoke(root, ["project", "ls", "--json"], catch_exceptions=False)
    rows = [(row["name"], row["files"], row["executions"]) for row in json.loads(listed.stdout)]
    assert rows == [("demo", 1, 0), ("slip", 1, 0)]
