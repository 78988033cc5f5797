"""Files of dataset versions come out of packages and are ordinary inputs afterwards (I-09)."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.agent.test_inputs import Rig
from valohai_agent.cache.shared import Share
from valohai_agent.errors import InputError
from valohai_agent.protocol import Checksums, JobFile, JobInput, JobPackage, Transfer

FILES = {f"sub/{number}.txt": f"content {number}".encode() * 400 for number in range(6)}
URI = "dataset://faces/v1, package 1 of 1"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.cache.close()


def entry(name: str, content: bytes, **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.GNU_FORMAT) as made:
        for info, content in entries:
            made.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def plain() -> bytes:
    return tar(*(entry(f"d{n}", content) for n, content in enumerate(FILES.values())))


def job_files(**changes: Any) -> list[JobFile]:
    return [
        JobFile(
            id=f"0.{number}",
            name=name,
            uri=f"datum://d{number}",
            datum_id=f"d{number}",
            size=len(content),
            checksums=Checksums(sha256=hashlib.sha256(content).hexdigest()),
            **changes,
        )
        for number, (name, content) in enumerate(FILES.items())
    ]


def package(content: bytes, ids: list[str] | None = None, **changes: Any) -> JobPackage:
    values: dict[str, Any] = {
        "id": "package.0",
        "uri": URI,
        "size": len(content),
        "checksums": Checksums(sha256=hashlib.sha256(content).hexdigest()),
        "files": ids or [f"0.{number}" for number in range(len(FILES))],
    }
    return JobPackage(**{**values, **changes})


def singles(rig: Rig) -> dict[str, Transfer]:
    """A grant for each of the files."""
    return {
        f"0.{number}": rig.source(f"single{number}", content)
        for number, content in enumerate(FILES.values())
    }


def fetch(
    rig: Rig,
    content: bytes,
    grants: dict[str, Transfer] | None = None,
    files: list[JobFile] | None = None,
    **options: Any,
) -> dict[str, Any]:
    item = JobInput(name="d", input_id="id", files=files or job_files())
    granted = {"package.0": rig.source("package.tar", content), **(grants or {})}
    options.setdefault("packages", [package(content)])
    return rig.fetch([item], granted, **options)


def found(rig: Rig) -> dict[str, bytes]:
    root = rig.workspace.inputs / "d"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def warned(rig: Rig) -> list[str]:
    return [line for line in rig.status if "cannot be used" in line]


@pytest.mark.parametrize("cached", [True, False])
def test_i09_the_user_sees_ordinary_files_and_each_is_told(rig: Rig, cached: bool) -> None:
    options = {} if cached else {"cache": None}
    content = fetch(rig, plain(), **options)
    assert found(rig) == FILES
    described = {item["name"]: item for item in content["d"]["files"]}
    assert described.keys() == FILES.keys()
    first = described["sub/0.txt"]
    assert first["path"] == "/valohai/inputs/d/sub/0.txt"
    assert first["datum_id"] == "d0"
    assert first["checksums"]["md5"] == hashlib.md5(FILES["sub/0.txt"]).hexdigest()
    assert sorted(report.file_id for report in rig.ready) == [f"0.{n}" for n in range(6)]
    assert not warned(rig)
    assert rig.status[0].startswith(f"{URI}: downloaded, ")
    assert all(
        os.stat(path).st_mode & 0o777 == 0o644 for path in rig.workspace.inputs.rglob("*.txt")
    )
    left = [*rig.workspace.run.rglob("*"), *(rig.path / "cache/coming").rglob("*")]
    assert not [path for path in left if path.is_file()]


def test_i09_a_package_is_cached_like_a_file(rig: Rig) -> None:
    fetch(rig, plain())
    (rig.path / "store" / "package.tar").unlink()
    rig.new_workspace()
    rig.ready.clear()
    item = JobInput(name="d", input_id="id", files=job_files())
    rig.fetch([item], {}, packages=[package(plain())])  # no grant for anything
    assert found(rig) == FILES
    assert all(report.cached for report in rig.ready)


def test_i09_keep_directories_and_several_inputs_get_their_own_copies(rig: Rig) -> None:
    flat = [
        file.model_copy(update={"id": f"1.{n}", "name": file.name.rpartition("/")[2]})
        for n, file in enumerate(job_files())
    ]
    inputs = [
        JobInput(name="d", input_id="d", files=job_files()),
        JobInput(name="flat", input_id="flat", files=flat),
    ]
    ids = [file.id for item in inputs for file in item.files]
    grants = {"package.0": rig.source("package.tar", plain())}
    rig.fetch(inputs, grants, packages=[package(plain(), ids)])
    assert found(rig) == FILES
    names = {path.name for path in (rig.workspace.inputs / "flat").iterdir()}
    assert names == {name.rpartition("/")[2] for name in FILES}


def test_i09_a_few_files_are_fetched_singly(rig: Rig) -> None:
    """Less than half of the bytes are wanted; the package is not even asked for."""
    asked: list[str] = []

    def renew(ids: Any) -> dict[str, Transfer]:
        asked.extend(ids)
        return {one: grant for one, grant in singles(rig).items() if one in ids}

    item = JobInput(name="d", input_id="id", files=job_files()[:2])
    rig.fetch([item], {}, packages=[package(plain(), ["0.0", "0.1"])], renew=renew)
    assert found(rig) == dict(list(FILES.items())[:2])
    assert set(asked) == {"0.0", "0.1"}


def test_i09_what_the_cache_has_as_files_is_not_fetched_in_a_package(rig: Rig) -> None:
    item = JobInput(name="d", input_id="id", files=job_files()[:4])
    rig.fetch([item], singles(rig))
    rig.new_workspace()
    fetch(rig, plain(), singles(rig))
    assert found(rig) == FILES
    package_name = hashlib.sha256(plain()).hexdigest()
    assert not list((rig.path / "cache/objects").rglob(package_name))


def bad_packages() -> dict[str, bytes]:
    contents = list(FILES.values())
    good = [entry(f"d{n}", content) for n, content in enumerate(contents)]
    link = entry("d0", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    hard = entry("d0", b"", type=tarfile.LNKTYPE, linkname="../../x")
    return {
        "a link": tar(link, *good),
        "a hard link": tar(hard, *good),
        "a device": tar(entry("d0", b"", type=tarfile.CHRTYPE), *good),
        "twice": tar(*good[:2], *good),
        "changed": tar(entry("d0", b"X" * len(contents[0])), *good[1:]),
        "another size": tar(entry("d0", b"X"), *good[1:]),
        "missing": tar(*good[1:]),
        "cut": tar(*good)[:-11_000],
        "no tar": b"no tar at all" * 400,
    }


@pytest.mark.parametrize("name", bad_packages())
def test_i09_a_package_that_is_wrong_is_told_and_its_files_come_singly(rig: Rig, name: str) -> None:
    fetch(rig, bad_packages()[name], singles(rig))
    assert found(rig) == FILES
    (line,) = warned(rig)
    assert line.startswith(f"{URI} cannot be used: ")
    assert line.endswith("Its files are fetched one by one.")


def test_i09_only_names_of_the_version_are_unpacked(rig: Rig) -> None:
    entries = [entry(f"d{n}", content) for n, content in enumerate(FILES.values())]
    strange = [entry(name, b"x") for name in ("../escaped", "/tmp/escaped", "d/other", "other")]
    fetch(rig, tar(*strange, *entries))
    assert found(rig) == FILES
    assert not warned(rig)
    assert not list(rig.path.rglob("escaped"))


def test_i09_a_damaged_download_is_not_unpacked(rig: Rig) -> None:
    wrong = package(plain(), checksums=Checksums(sha256="0" * 64))
    fetch(rig, plain(), singles(rig), packages=[wrong])
    assert found(rig) == FILES
    assert len(warned(rig)) == 1


@pytest.mark.parametrize("how", ["refused", "gone", "without a grant"])
def test_i09_a_package_that_cannot_be_had_costs_nothing_but_time(rig: Rig, how: str) -> None:
    item = JobInput(name="d", input_id="id", files=job_files())
    grants, refused = singles(rig), {}
    if how == "refused":
        refused = {"package.0": "it was given up"}
    elif how == "gone":
        grants["package.0"] = Transfer(url=(rig.path / "nowhere.tar").as_uri())
    rig.fetch([item], grants, packages=[package(plain())], refused=refused)
    assert found(rig) == FILES


def test_i09_files_that_cannot_be_had_singly_either_fail_the_job(rig: Rig) -> None:
    """A purged file is in no package that is granted, and has no object of its own."""
    grants = singles(rig)
    (rig.path / "store" / "single3").unlink()
    item = JobInput(name="d", input_id="id", files=job_files())
    with pytest.raises(InputError, match=r"1 of 6 input files failed: .*datum://d3"):
        rig.fetch([item], grants, packages=[package(plain())], refused={"package.0": "given up"})


def test_i09_the_bytes_of_packages_count_as_those_of_their_files(rig: Rig) -> None:
    told: list[tuple[int, int | None]] = []
    fetch(rig, plain(), progress=lambda done, total: told.append((done, total)))
    total = sum(map(len, FILES.values()))
    assert told[-1] == (total, total)


@pytest.mark.parametrize("copy", [False, True])
def test_i09_a_shared_cache_has_packages_too_and_the_files_lie_on_the_worker(
    rig: Rig, copy: bool
) -> None:
    """A file that is in no package lies beside the others, also where inputs are used in place on the share."""
    (rig.path / "share").mkdir()
    share = Share(rig.path / "share", usage=lambda path: (0, 10**15), copy=copy)
    options = {"share": share, "tree": None if copy else Share.tree}
    alone = JobFile(id="0.9", name="alone", uri="datum://d9", datum_id="d9", size=5)
    files = [*job_files(), alone]
    fetch(rig, plain(), {"0.9": rig.source("alone", b"alone")}, files, **options)
    assert found(rig) == {**FILES, "alone": b"alone"}
    assert rig.workspace.in_place == {}
    for name in ("package.tar", "alone"):
        (rig.path / "store" / name).unlink()
    other = Rig(rig.path / "other")
    item = JobInput(name="d", input_id="id", files=files)
    other.fetch([item], {}, packages=[package(plain())], **options)
    assert found(other) == {**FILES, "alone": b"alone"}
    assert all(report.cached for report in other.ready)
    other.cache.close()
    share.close()
