"""What is remembered of files that are no datums, and when that is a warning (I-32)."""

from __future__ import annotations

import pytest

from tests.integration.data.conftest import NOW, Place
from valohai_agent.protocol import Checksums, JobFile
from valohai_dagster.data.outside import Found, note_contents, note_versions, version_of

pytestmark = pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)


def file(uri: str, version: str | None) -> JobFile:
    return JobFile(id="0.0", name="x", uri=uri, cache_key=version and f"{uri}@{version}")


def versions(place: Place, execution: str, **files: str | None) -> list[str]:
    with place.records.write() as connection:
        return note_versions(
            connection,
            [file(f"s3://b/{name}", version) for name, version in files.items()],
            execution_id=execution,
            now=NOW,
        )


def contents(place: Place, execution: str, **files: str) -> list[str]:
    found = [
        Found(uri=f"s3://b/{name}", checksums=Checksums(sha256=sha256), size=1)
        for name, sha256 in files.items()
    ]
    with place.records.write() as connection:
        return note_contents(connection, found, execution_id=execution, now=NOW)


def test_i32_another_version_is_told_once(place: Place) -> None:
    assert versions(place, "e1", a="1", b="1", c=None) == []
    assert versions(place, "e2", a="1") == []
    (warning,) = versions(place, "e3", a="2", b="1", c="1")
    assert "s3://b/a has changed since it was last used: its version is 2, was 1" in warning
    assert versions(place, "e4", a="2") == []


def test_i32_other_content_is_told_also_when_the_version_was(place: Place) -> None:
    versions(place, "e1", a="1")
    assert contents(place, "e1", a="x") == []
    assert len(versions(place, "e2", a="2")) == 1
    (warning,) = contents(place, "e2", a="y")
    assert "differs from its last use by an earlier execution (e1): sha256 y, was x" in warning
    assert contents(place, "e2", a="z") == [], "another attempt of the same execution"
    assert contents(place, "e3", a="z") == []


def test_i32_many_changed_files_are_counted(place: Place) -> None:
    names = [f"f{number}" for number in range(30)]
    versions(place, "e1", **dict.fromkeys(names, "1"))
    found = versions(place, "e2", **dict.fromkeys(names, "2"))
    assert len(found) == 11
    assert found[-1] == "20 further files have changed since their last use"


def test_versions_are_those_of_outside_files_only(place: Place) -> None:
    assert version_of(file("s3://b/a@b", "v@1")) == "v@1"
    datum = JobFile(id="0", name="x", uri="datum://i", datum_id="i", cache_key="datum://i@5")
    assert version_of(datum) is None
    assert version_of(file("https://h/a", None)) is None


def test_addresses_of_any_length_are_remembered(place: Place) -> None:
    name = "x" * 6_000
    assert versions(place, "e1", **{name: "1"}) == []
    assert len(versions(place, "e2", **{name: "2"})) == 1
