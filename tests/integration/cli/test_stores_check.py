"""`valohai-dagster doctor` and `stores ls|check` on stores that work and stores that do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.support.ports import free_port
from tests.support.servers.kinds import SwiftServer
from tests.support.servers.s3_stores import s3_store, swift_s3_store
from valohai_dagster.cli import checks, stores
from valohai_dagster.settings import Settings
from valohai_dagster.stores.s3 import S3Store

RUNNER = CliRunner()


def section(store: S3Store, **options: Any) -> dict[str, Any]:
    values = store._section.model_dump(exclude_none=True)
    secret = store._section.secret_access_key
    return {**values, "secret_access_key": secret.get_secret_value() if secret else None, **options}


def settings_of(tmp_path: Path, **sections: dict[str, Any]) -> Settings:
    stores: Any = sections
    return Settings(state_dir=tmp_path / "state", stores=stores)


def test_every_store_is_written_read_and_cleaned_up(tmp_path: Path, moto_server: str) -> None:
    store = s3_store(moto_server)
    settings = settings_of(tmp_path, models=section(store), archive=section(store, readonly=True))
    findings = {finding.text.split()[0]: finding for finding in checks.check_stores(settings)}
    assert {finding.level for finding in findings.values()} == {"ok"}
    assert "(write, read, signed read, delete)" in findings["models"].text
    assert "(s3, read-only)" in findings["archive"].text
    assert "local: outputs, code, logs, agents" in findings["local"].text.replace(" (local)", "")
    assert list(store.list()) == []


def test_a_broken_store_hides_no_other_and_shows_no_secret(
    tmp_path: Path, moto_server: str, swift_server: SwiftServer
) -> None:
    fine = section(s3_store(moto_server))
    settings = settings_of(
        tmp_path,
        missing={**fine, "bucket": "nobody-made-this"},
        away={**fine, "endpoint_url": f"http://127.0.0.1:{free_port()}"},
        denied=section(swift_s3_store(swift_server), secret_access_key="hunter2"),
        fine=fine,
    )
    findings = {finding.text.split()[0]: finding for finding in checks.check_stores(settings)}
    levels = {name: finding.level for name, finding in findings.items()}
    assert levels == {
        "missing": "fail",
        "away": "fail",
        "denied": "fail",
        "fine": "ok",
        "local": "ok",
    }
    assert "write failed" in findings["denied"].text
    assert "there is no bucket 'nobody-made-this'" in findings["missing"].text
    assert "credentials" not in findings["missing"].text
    texts = "".join(finding.text for finding in findings.values())
    assert "hunter2" not in texts
    assert "X-Amz" not in texts


def test_outputs_cannot_go_where_nothing_can_be_written(tmp_path: Path, moto_server: str) -> None:
    store = section(s3_store(moto_server), readonly=True)
    settings = settings_of(tmp_path, archive=store).model_copy(update={"default_store": "archive"})
    finding = next(found for found in checks.check_stores(settings) if "archive" in found.text)
    assert finding.level == "fail"
    assert finding.hint is not None
    assert "writable" in finding.hint


# -- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def deployment(tmp_path: Path, moto_server: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A directory with a valohai.toml; the secret comes from the environment."""
    store = s3_store(moto_server)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "valohai.toml").write_text(
        f"""[stores.models]
kind = "s3"
bucket = "{store.place}"
endpoint_url = "{moto_server}"
access_key_id = "testing"
"""
    )
    monkeypatch.setenv("VALOHAI_STORES__models__SECRET_ACCESS_KEY", "testing")
    return store


def run(*arguments: str) -> Result:
    return RUNNER.invoke(stores.app, list(arguments), catch_exceptions=False)


def test_the_stores_are_listed_with_what_they_are_used_for(deployment: S3Store) -> None:
    rows = {row["name"]: row for row in json.loads(run("ls", "--json").stdout)}
    assert rows["models"]["place"] == deployment.uri("")
    assert rows["local"]["uses"] == ["outputs", "code", "logs", "agents"]
    assert deployment.uri("") in run("ls").stdout


def test_a_store_without_its_library_hides_no_other(
    deployment: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("valohai.toml").open("a") as file:
        file.write('[stores.away]\nkind = "azure"\naccount = "a"\ncontainer = "c"\n')
    monkeypatch.delitem(sys.modules, "valohai_dagster.stores.azure", raising=False)
    monkeypatch.setitem(sys.modules, "azure.core", None)
    rows = {row["name"]: row for row in json.loads(run("ls", "--json").stdout)}
    assert (rows["models"]["place"], rows["models"]["problem"]) == (deployment.uri(""), None)
    assert rows["away"]["place"] is None
    lines = run("ls").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("away")]
    assert "needs a library that is not installed" in line
    assert "[azure]" in line
    deployment.put("other.txt", b"12345")
    assert "other.txt" in run("ls", "models").stdout


def test_what_lies_in_a_store_is_listed(deployment: S3Store) -> None:
    for key in ("sets/a.jpg", "sets/deep/b.jpg", "other.txt"):
        deployment.put(key, b"12345")
    rows = json.loads(run("ls", "models", "--json").stdout)
    assert [row["key"] for row in rows] == ["other.txt", "sets/a.jpg", "sets/deep/b.jpg"]
    assert rows[0]["size"] == 5
    assert "sets/deep/b.jpg" in run("ls", "models", "--prefix", "sets/").stdout
    found = json.loads(run("ls", "models", "--prefix", "sets/*.jpg", "--json").stdout)
    assert [row["key"] for row in found] == ["sets/a.jpg"]
    assert "only the first 1 are shown" in run("ls", "models", "--limit", "1").stderr


def test_one_store_is_checked(deployment: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("check", "models", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["level"] == "ok"
    monkeypatch.setenv("VALOHAI_STORES__models__BUCKET", "nobody-made-this")
    every = json.loads(run("check", "--json").stdout)
    assert {finding["text"].split()[0] for finding in every} == {"models", "local"}
    result = run("check", "models")
    assert result.exit_code == 1
    assert "write failed" in result.stdout
