"""`valohai-dagster data datasets packaging`: the switch, what is shown of packages, and their end (O-23)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cli.test_data_versions import loads, put, run
from valohai_dagster.cli.data_place import Deployment, deployment, now
from valohai_dagster.data import datasets, own_uploads, packages
from valohai_dagster.errors import NotFoundError, RefusedError

ME = "me"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment whose conductors others start, so that none packs what a test says it packs itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", "redis://127.0.0.1:1")


def pack(here: Deployment, uri: str, problem: str | None = None) -> None:
    """What a conductor does, with a package that holds nothing."""
    with here.records.write() as connection:
        project = here.need_project("demo")
        version = datasets.get_version(connection, uri, project_id=project)
        key = f"packages/{version.id}/x/package.tar"
        assert packages.claim(connection, version.id, ME, now())
        if problem is None:
            found = here.stores.default.put(key, b"tar")
            upload = own_uploads.OwnUpload(
                upload_id="x",
                kind="package",
                name="x",
                store="local",
                key=key,
                begun_at=now(),
                expires_at=now() + own_uploads.LIFE,
            )
            own_uploads.note(connection, upload)
            package = packages.Package(
                id="x",
                version_id=version.id,
                number=1,
                store="local",
                key=key,
                size=found.size,
                files=1,
                sha256="0" * 64,
                ctime=now(),
            )
            ids = [one.id for one in datasets.files_of(connection, version.id)]
            assert packages.record(connection, package, ids, holder=ME, now=now())
        assert packages.end(connection, version.id, ME, problem)


def shown(name: str = "faces/v1") -> dict[str, object]:
    return loads("datasets", "show", name)["packages"]


def left() -> list[str]:
    with deployment() as here:
        return [found.key for found in here.stores.default.list("packages/")]


def test_o23_a_version_is_packed_and_shown_and_its_packages_go_when_switched_off() -> None:
    uri = put("a.txt")
    run("datasets", "create", "faces/v1", uri)
    assert shown() is None
    done = run("datasets", "packaging", "faces/v1", "on")
    assert "dataset://faces/v1 is to be packed" in done.stdout
    assert "the next conductor that is free packs it in the background" in done.stderr
    assert "note: it has 1 file, and packages are worth it from 1,000 on" in done.stderr
    assert shown()["state"] == "wanted"
    with deployment() as here:
        pack(here, "dataset://faces/v1")
    assert shown() == {"state": "made", "problem": None, "count": 1, "bytes": 3, "files": 1}
    (version,) = loads("datasets", "show", "faces")["versions"]
    assert version["packages"]["count"] == 1
    assert "made: 1 package, 3 B" in run("datasets", "show", "faces").stdout
    assert "packages made: 1 package, 3 B" in run("datasets", "show", "faces/v1").stdout
    (known,) = loads("info", uri)
    assert known["packages"] == ["dataset://faces/v1: made: 1 package, 3 B"]
    assert len(left()) == 1
    run("datasets", "packaging", "faces/v1", "off")
    assert left() == []
    assert shown()["state"] == "dropped"
    run("datasets", "packaging", "faces/v1", "on")
    assert shown()["state"] == "wanted"


def test_o23_the_switch_of_a_dataset_is_for_its_new_versions() -> None:
    uri = put("a.txt")
    run("datasets", "create", "faces/v1", uri)
    assert "new versions" in run("datasets", "packaging", "faces", "on").stdout
    assert loads("datasets", "ls")[0]["packaging"] is True
    assert shown() is None
    run("datasets", "create", "faces/v2", uri)
    assert shown("faces/v2")["state"] == "wanted"
    run("datasets", "packaging", "faces", "off")
    run("datasets", "create", "faces/v3", uri)
    assert shown("faces/v3") is None


def test_o23_a_failure_is_shown_with_its_cause() -> None:
    run("datasets", "create", "faces/v1", put("a.txt"))
    run("datasets", "packaging", "faces/v1", "on")
    with deployment() as here:
        pack(here, "dataset://faces/v1", "a.txt is damaged")
    assert "packages failed (a.txt is damaged)" in run("datasets", "show", "faces/v1").stdout


def test_i09_purging_a_file_removes_the_packages_that_hold_it() -> None:
    uri = put("a.txt")
    run("datasets", "create", "faces/v1", uri)
    run("datasets", "packaging", "faces/v1", "on")
    with deployment() as here:
        pack(here, "dataset://faces/v1")
    run("rm", uri, "--force", "--yes")
    assert left() == []
    assert shown()["problem"] == f"{uri} was purged"
    with pytest.raises(RefusedError, match="the content was purged"):
        run("datasets", "packaging", "faces/v1", "on")


def test_o23_bad_requests_say_what_is_wrong() -> None:
    put("a.txt")
    with pytest.raises(NotFoundError, match="no dataset 'none'"):
        run("datasets", "packaging", "none", "on")
    assert "'maybe'" in run("datasets", "packaging", "faces", "maybe", code=2).output


def test_i40_packages_are_not_adopted() -> None:
    run("datasets", "create", "faces/v1", put("a.txt"))
    run("datasets", "packaging", "faces/v1", "on")
    with deployment() as here:
        pack(here, "dataset://faces/v1")
        key = left()[0].replace("/x/", "/0b5f9a4e-0000-4000-8000-000000000000/")
        here.stores.default.put(key, b"tar")
    failed = run("adopt", f"store://local/{key}", "-p", "demo", code=1)
    assert "adoptable_file_is_ours" in failed.output
