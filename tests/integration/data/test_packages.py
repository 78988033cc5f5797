"""Packages of dataset versions: what the records say of them, how they are written, and who may use them (O-23)."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from tests.integration.data.conftest import NOW, Place
from tests.support.remote_stores import make_remote
from valohai_dagster.data import datasets, own_uploads, packages
from valohai_dagster.data.datums import Datum, mark_purged
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.package_removal import remove_packages
from valohai_dagster.data.package_writing import (
    Stopped,
    Written,
    plan_packages,
    store_for,
    write_package,
)
from valohai_dagster.data.packages import Package
from valohai_dagster.errors import RefusedError, ResolutionError, StoreMissing
from valohai_dagster.records import tables as t
from valohai_dagster.stores.registry import Stores

BOTH = pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)
LATER = NOW + timedelta(hours=3)
SIZES = (0, 1, 511, 512, 513, 70_000, 1_100_000)


def datum(place: Place, name: str, content: bytes, **changes: Any) -> Datum:
    values = {"sha256": hashlib.sha256(content).hexdigest(), **changes}
    return place.datum(name, content, **values)


def some(place: Place, sizes: Sequence[int] = SIZES) -> dict[str, tuple[Datum, bytes]]:
    """Datums with their contents, by id."""
    contents = [bytes([number]) * size for number, size in enumerate(sizes)]
    made = [datum(place, f"sub/{n}", content) for n, content in enumerate(contents)]
    return {one.id: (one, content) for one, content in zip(made, contents, strict=True)}


def version_of(place: Place, files: Sequence[Datum], name: str = "v") -> datasets.DatasetVersion:
    with place.records.write() as connection:
        return datasets.create_version(
            connection,
            project_id="p1",
            uri=f"dataset://d/{name}",
            datum_ids=[one.id for one in files],
            now=NOW,
        )


def write(place: Place, files: Sequence[Datum], key: str = "packages/p.tar") -> Written:
    return write_package(files, place.stores, place.stores.default, key, stop=threading.Event())


def packed(place: Place, name: str = "v", sizes: Sequence[int] = (10, 20, 30)) -> tuple[Any, Any]:
    """A version with one package of all its files, as the conductor makes it."""
    files = [one for one, _ in some(place, sizes).values()]
    version = version_of(place, files, name)
    key = f"packages/{version.id}/x/package.tar"
    written = write(place, files, key)
    with place.records.write() as connection:
        packages.want(connection, version.id, NOW)
        assert packages.claim(connection, version.id, "me", NOW)
        note(connection, key)
        package = Package(
            id=f"package-{name}",
            version_id=version.id,
            number=1,
            store="local",
            key=key,
            size=written.size,
            files=len(files),
            sha256=written.sha256,
            ctime=NOW,
        )
        ids = [one.id for one in files]
        assert packages.record(connection, package, ids, holder="me", now=NOW)
        assert packages.end(connection, version.id, "me")
    return version, files


def note(connection: sa.Connection, key: str) -> None:
    own_uploads.note(
        connection,
        own_uploads.OwnUpload(
            upload_id=key[-30:], kind="package", name="p", store="local", key=key,
            begun_at=NOW, expires_at=LATER,
        ),
    )  # fmt: skip


def state(place: Place, version_id: str) -> str:
    with place.records.read() as connection:
        known = packages.packaging_of(connection, version_id)
    assert known is not None
    return known.state


def spec(**values: Any) -> InputSpec:
    return InputSpec(**{"name": "in", "uris": ["dataset://d/v"], **values})


# -- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_o23_a_package_is_an_uncompressed_tar_of_all_files(
    place: Place, request: pytest.FixtureRequest, kind: str
) -> None:
    files = some(place)
    made = [one for one, _ in files.values()]
    target = place.stores.default if kind == "local" else make_remote("s3", request)
    written = write_package(made, place.stores, target, "packages/p.tar", stop=threading.Event())
    with target.open("packages/p.tar") as stream:
        content = stream.read()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (written.size, written.sha256)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        members = {entry.name: tar.extractfile(entry) for entry in tar}
        read = {name: source.read() for name, source in members.items() if source is not None}
    assert read == {ident: content for ident, (_, content) in files.items()}
    for ident, (one, _) in files.items():
        assert written.checksums[ident].sha256 == one.sha256


def test_o23_the_same_files_give_the_same_package(place: Place) -> None:
    files = [one for one, _ in some(place).values()]
    first, second = write(place, files, "packages/1.tar"), write(place, files, "packages/2.tar")
    assert first == second


def test_o23_files_are_read_from_their_own_stores(
    place: Place, request: pytest.FixtureRequest
) -> None:
    far = make_remote("s3", request)
    stores = Stores({"local": place.stores.default, "far": far}, default="local")
    far.put("data/x", b"far" * 1000)
    here = datum(place, "a", b"near")
    there = Datum(
        id="f" * 36, name="b", size=3000, store="far", key="data/x", ctime=NOW, project_id="p1"
    )
    assert store_for([here, there], stores) == "far"
    written = write_package([here, there], stores, far, "packages/p.tar", stop=threading.Event())
    assert written.checksums[there.id].sha256 == hashlib.sha256(b"far" * 1000).hexdigest()


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"size": 9}, {"size": 11}])
@pytest.mark.parametrize("size", [10, 2_000_000])
def test_o23_a_content_that_is_not_what_its_record_says_is_refused_and_nothing_stays(
    place: Place, changes: dict[str, Any], size: int
) -> None:
    if "size" in changes:
        changes = {"size": changes["size"] - 10 + size}
    wrong = datum(place, "wrong", b"x" * size, **changes)
    with pytest.raises(RefusedError, match=f"{wrong.uri}.*changed or damaged"):
        write(place, [datum(place, "a", b"a"), wrong])
    assert not list(place.stores.default.list("packages/"))
    assert not list((place.stores.default.root / "packages").glob("*"))  # type: ignore[attr-defined]


def test_o23_a_file_that_is_gone_is_named_and_a_purged_one_refused(place: Place) -> None:
    gone = datum(place, "gone", b"x")
    place.stores.default.delete(gone.key)
    with pytest.raises(StoreMissing, match=gone.key):
        write(place, [gone])
    with pytest.raises(RefusedError, match="the content was purged"):
        write(place, [datum(place, "p", b"x", purged=True)])


def test_o23_writing_stops_when_nobody_wants_the_package_any_more(place: Place) -> None:
    stop = threading.Event()
    stop.set()
    files = [one for one, _ in some(place).values()]
    with pytest.raises(Stopped):
        write_package(files, place.stores, place.stores.default, "packages/p.tar", stop=stop)


def test_o23_packages_are_bounded_and_what_fits_into_none_stays_single(place: Place) -> None:
    files = [one for one, _ in some(place, [30_000, 30_000, 30_000, 70_000, 10]).values()]
    planned = plan_packages(files, 65_536)
    assert [[files.index(one) for one in group] for group in planned] == [[0, 1], [2, 4]]
    for number, group in enumerate(planned):
        assert write(place, group, f"packages/{number}.tar").size <= 65_536


# -- the records -------------------------------------------------------------------------------------------------


@BOTH
def test_o23_one_holder_packs_a_version_until_it_is_silent(place: Place) -> None:
    version = version_of(place, [datum(place, "a", b"a")])
    with place.records.write() as connection:
        packages.want(connection, version.id, NOW)
        assert packages.next_wanted(connection, NOW) == version.id
        assert packages.claim(connection, version.id, "first", NOW)
        assert packages.next_wanted(connection, NOW) is None
        assert not packages.claim(connection, version.id, "second", NOW)
        assert packages.keep(connection, version.id, "first", NOW + packages.CLAIM)
        late = NOW + 2 * packages.CLAIM
        assert packages.claim(connection, version.id, "second", late)
        assert not packages.keep(connection, version.id, "first", late)
        assert not packages.end(connection, version.id, "first")
        assert packages.end(connection, version.id, "second")
    assert state(place, version.id) == packages.MADE


@BOTH
def test_o23_a_try_that_failed_comes_later_and_a_final_failure_is_tried_when_asked(
    place: Place,
) -> None:
    version = version_of(place, [datum(place, "a", b"a")])
    with place.records.write() as connection:
        packages.want(connection, version.id, NOW)
        packages.claim(connection, version.id, "me", NOW)
        packages.put_off(connection, version.id, "me", problem="away", due=LATER)
        assert packages.next_wanted(connection, NOW) is None
        assert packages.claim(connection, version.id, "me", LATER)
        packages.end(connection, version.id, "me", "damaged")
        known = packages.packaging_of(connection, version.id)
        assert known is not None
        assert (known.state, known.problem, known.tries) == (packages.FAILED, "damaged", 1)
        packages.want(connection, version.id, LATER)
        assert packages.next_wanted(connection, LATER) == version.id


@BOTH
def test_o23_a_package_whose_upload_was_given_up_is_not_recorded(place: Place) -> None:
    files = [datum(place, "a", b"a")]
    version = version_of(place, files)
    package = Package(
        id="x", version_id=version.id, number=1, store="local", key="k", size=1, files=1,
        sha256="0" * 64, ctime=NOW,
    )  # fmt: skip
    with place.records.write() as connection:
        packages.want(connection, version.id, NOW)
        packages.claim(connection, version.id, "me", NOW)
        ids = [files[0].id]
        assert not packages.record(connection, package, ids, holder="me", now=NOW)
        assert packages.members_of(connection, version.id) == {}


@BOTH
def test_o23_a_purged_file_takes_the_packages_of_its_versions_with_it(place: Place) -> None:
    version, files = packed(place)
    other, _ = packed(place, "other")
    with place.records.write() as connection:
        mark_purged(connection, [files[1].id])
        removals = packages.drop_holding(connection, [files[1].id], NOW)
        assert packages.packages_of(connection, version.id) == []
        assert packages.members_of(connection, version.id) == {}
    (removal,) = removals
    assert (state(place, version.id), state(place, other.id)) == (packages.DROPPED, packages.MADE)
    remove_packages(place.records, place.stores, removals)
    left = [found.key for found in place.stores.default.list("packages/")]
    assert left == [f"packages/{other.id}/x/package.tar"]
    with place.records.read() as connection:
        rows = connection.execute(sa.select(t.uploads.c.upload_id)).scalars().all()
    assert removal not in rows


# -- resolving ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("keep", ["none", "full"])
def test_i09_a_packed_version_resolves_to_its_files_and_their_packages(
    place: Place, keep: Any
) -> None:
    version, files = packed(place)
    resolved = place.resolve(spec(keep_directories=keep))
    (item,) = resolved.inputs
    assert [file.datum_id for file in item.files] == [one.id for one in files]
    assert [file.name for file in item.files] == [
        one.name if keep == "full" else one.name.rpartition("/")[2] for one in files
    ]
    (package,) = resolved.packages
    assert package.uri == f"{version.uri}, package 1 of 1"
    assert package.files == [file.id for file in item.files]
    source = resolved.sources[package.id]
    assert (source.store, source.package) == ("local", "package-v")
    assert set(resolved.sources) == {package.id, *package.files}
    assert set(resolved.asked) == set(package.files)


def test_i09_one_package_serves_several_inputs_and_on_demand_ones_need_none(place: Place) -> None:
    packed(place)
    resolved = place.resolve(spec(), spec(name="again"), spec(name="later", download="on-demand"))
    (package,) = resolved.packages
    assert {file_id.partition(".")[0] for file_id in package.files} == {"0", "1"}


def test_i09_a_package_with_a_purged_file_is_not_used_even_if_nobody_dropped_it(
    place: Place,
) -> None:
    version, files = packed(place)
    with place.records.write() as connection:
        mark_purged(connection, [files[0].id])
        assert packages.usable(connection, ["package-v"]) == set()
        assert packages.usable(connection, ["package-other"]) == set()
    with pytest.raises(ResolutionError, match="the content was purged"):
        place.resolve(spec())
    assert version.state == datasets.CLOSED


@pytest.mark.parametrize(
    ("end", "warning"),
    [
        ("failed", "could not be packed"),
        ("away", "cannot be packed for now"),
        ("wanted", None),
        ("dropped", None),
    ],
)
def test_i09_a_version_without_packages_works_file_by_file_and_the_cause_is_told(
    place: Place, end: str, warning: str | None
) -> None:
    files = [one for one, _ in some(place, (1, 2)).values()]
    version = version_of(place, files)
    with place.records.write() as connection:
        packages.want(connection, version.id, NOW)
        packages.claim(connection, version.id, "me", NOW)
        if end == "failed":
            packages.end(connection, version.id, "me", "the disk is broken")
        elif end == "away":
            packages.put_off(connection, version.id, "me", problem="the disk is broken", due=LATER)
        elif end == "dropped":
            packages.drop(connection, version.id, "switched off", NOW)
    resolved = place.resolve(spec())
    assert resolved.packages == []
    assert len(resolved.inputs[0].files) == 2
    if warning is None:
        assert resolved.warnings == []
    else:
        (told,) = resolved.warnings
        assert warning in told
        assert told.endswith("The cause: the disk is broken")


def test_i09_packages_that_were_made_before_packing_failed_are_used(place: Place) -> None:
    version, files = packed(place)
    f = t.dataset_files.c
    with place.records.write() as connection:
        connection.execute(
            t.dataset_files.update().where(f.datum_id == files[2].id).values(package_id=None)
        )
        failed = {"state": packages.FAILED, "problem": "the disk is broken"}
        connection.execute(t.packagings.update().values(**failed))
    resolved = place.resolve(spec())
    (package,) = resolved.packages
    assert package.files == [file.id for file in resolved.inputs[0].files[:2]]
    (told,) = resolved.warnings
    assert f"{version.uri} could not be packed" in told
    assert "Files that are in no package are fetched one by one" in told


def test_o23_advice_is_given_for_few_or_large_files() -> None:
    assert packages.advice([1000] * 1000) is None
    assert "it has 999 files" in (packages.advice([1000] * 999) or "")
    assert "1 of its files are above 10 MB" in (packages.advice([1000] * 1000 + [10_000_001]) or "")
