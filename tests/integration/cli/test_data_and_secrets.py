"""`valohai-dagster data` and `valohai-dagster secrets` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from valohai_dagster.cli import data, secrets
from valohai_dagster.errors import NotFoundError, RefusedError, StoreNotWritable

RUNNER = CliRunner()


def run(app: Any, *arguments: str, given: str | None = None) -> Result:
    """Runs one command; our own errors come out as they are."""
    result = RUNNER.invoke(app, list(arguments), input=given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_put_get_and_ls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a b.csv").write_text("1,2\n")
    made = run(data.app, "put", "a b.csv", "-p", "demo", "--alias", "best", "--tag", "t").stdout
    uri = made.split()[0]
    assert uri.startswith("datum://")
    (listed,) = json.loads(run(data.app, "ls", "*.csv", "--json").stdout)
    assert (listed["uri"], listed["name"], listed["size"]) == (uri, "a b.csv", 4)
    assert (listed["aliases"], listed["tags"]) == (["best"], ["t"])
    assert "a b.csv" in run(data.app, "ls", "-p", "demo").stdout
    for number, reference in enumerate((uri, "best", "datum://best", uri[8:])):
        run(data.app, "get", reference, "-p", "demo", "-o", f"out{number}")
        assert Path(f"out{number}").read_text() == "1,2\n"
    run(data.app, "get", uri)
    Path("a b.csv").write_text("changed")
    with pytest.raises(RefusedError, match="exists already and is something else"):
        run(data.app, "get", uri)
    run(data.app, "get", uri, "--overwrite")
    assert Path("a b.csv").read_text() == "1,2\n"


def test_put_takes_whole_directories_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "set" / "sub" / "x").write_text("1")
    (tmp_path / "set" / "y").write_text("2")
    for _ in range(2):
        made = json.loads(run(data.app, "put", "set", "--json").stdout)
        assert [item["name"] for item in made] == ["sub/x", "y"]
    assert len(json.loads(run(data.app, "ls", "--json").stdout)) == 4
    first = json.loads(run(data.app, "ls", "sub/*", "--json").stdout)[0]["id"]
    run(data.app, "get", first, "-o", str(tmp_path))
    assert (tmp_path / "sub" / "x").read_text() == "1"


def test_bad_requests_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f").write_text("")
    Path("empty").mkdir()
    wrong: list[tuple[tuple[str, ...], str]] = [
        (("put", "nothing"), "nothing is not a file or directory"),
        (("put", "empty"), "holds no files"),
        (("put", "f", "--alias", "a"), "--alias needs --project"),
        (("put", "f", "--alias", " "), "is no datum alias"),
        (("put", "f", "f", "--name", "x"), "--name needs exactly one file"),
        (("get", "nope", "-p", "gone"), "no project 'gone'"),
        (("get", "nope"), "no project has a datum of this id, alias or name"),
        (("get", "00000000-0000-4000-8000-000000000000"), "no datum with this id"),
    ]
    for arguments, expected in wrong:
        with pytest.raises(RefusedError, match=expected):
            run(data.app, *arguments)


def test_a_store_that_is_not_writable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_text("x")
    monkeypatch.setenv("VALOHAI_STORES", json.dumps({"local": {"path": str(tmp_path / "f")}}))
    with pytest.raises(StoreNotWritable, match=r"the store 'local' .*\[stores\.local\]"):
        run(data.app, "put", str(tmp_path / "f"))


def test_secrets_are_set_from_standard_input_and_never_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(secrets.app, "set", "prod", "TOKEN", given="hunter2\n")
    run(secrets.app, "set", "prod", "REGION", "--plain", given="eu\n")
    shown = run(secrets.app, "ls").stdout
    assert shown == "prod/REGION = eu\nprod/TOKEN = ***\n"
    listed = run(secrets.app, "ls", "prod", "--json").stdout
    assert "hunter2" not in listed
    assert [item["value"] for item in json.loads(listed)] == ["eu", None]
    run(secrets.app, "rm", "prod", "TOKEN")
    with pytest.raises(NotFoundError, match="no variable 'TOKEN' in group 'prod'"):
        run(secrets.app, "rm", "prod", "TOKEN")


def test_a_value_is_never_taken_from_the_command_line() -> None:
    result = RUNNER.invoke(secrets.app, ["set", "prod", "TOKEN", "hunter2"])
    assert result.exit_code == 2
    with pytest.raises(RefusedError, match="standard input is empty"):
        run(secrets.app, "set", "prod", "TOKEN", given="")


def test_an_empty_list_says_how_to_set_one() -> None:
    assert "secrets set GROUP NAME" in run(secrets.app, "ls").stdout
