"""Uploads and downloads: hashed on the way, whole or not at all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.data.conftest import NOW, Place
from tests.support.servers.s3_stores import s3_client, s3_store
from tests.support.servers.stores import swift_store
from valohai_dagster.data.datums import Datum
from valohai_dagster.data.transfers import Mover, fetch_datum, local_path, safe_name, store_file
from valohai_dagster.errors import RefusedError, StoreBadKey, StoreError, StoreMissing
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores

CONTENT = bytes(range(256)) * 10_000


@pytest.fixture
def mover() -> Iterator[Mover]:
    with Mover() as mover:
        yield mover


def upload(place: Place, path: Path, mover: Mover, name: str = "a.bin") -> Datum:
    return store_file(
        path, name=name, store=place.stores.default, project_id="p1", now=NOW, mover=mover
    )


def test_o19_a_file_is_stored_with_size_and_checksums(
    place: Place, tmp_path: Path, mover: Mover
) -> None:
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    counted: list[int] = []
    datum = store_file(
        path,
        name="dir/a b.bin",
        store=place.stores.default,
        project_id="p1",
        now=NOW,
        mover=mover,
        progress=counted.append,
    )
    assert (datum.size, sum(counted)) == (len(CONTENT), len(CONTENT))
    assert datum.md5 == hashlib.md5(CONTENT).hexdigest()
    assert datum.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert datum.key == f"data/p1/{datum.id}/a_b.bin"
    target = tmp_path / "new" / "dir" / "a"
    fetch_datum(datum, target, stores=place.stores, mover=mover)
    assert target.read_bytes() == CONTENT
    assert [item.name for item in target.parent.iterdir()] == ["a"]


def test_an_unreadable_file_is_named(place: Place, tmp_path: Path, mover: Mover) -> None:
    with pytest.raises(RefusedError, match=r"cannot read .*nothing: No such file"):
        upload(place, tmp_path / "nothing", mover)


def test_a_damaged_object_is_never_delivered(place: Place, tmp_path: Path, mover: Mover) -> None:
    datum = place.datum("a", b"damaged", sha256="0" * 64)
    with pytest.raises(StoreError, match=r"\(a\): has sha256 .* expected 0000.*'local'"):
        fetch_datum(datum, tmp_path / "new" / "a", stores=place.stores, mover=mover)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_existing_file_is_not_replaced_unless_asked(
    place: Place, tmp_path: Path, mover: Mover
) -> None:
    datum = place.datum("a", b"new", sha256=hashlib.sha256(b"new").hexdigest())
    (tmp_path / "a").write_text("old")
    with pytest.raises(RefusedError, match=r"exists already and is something else.*--overwrite"):
        fetch_datum(datum, tmp_path / "a", stores=place.stores, mover=mover)
    assert (tmp_path / "a").read_text() == "old"
    fetch_datum(datum, tmp_path / "a", stores=place.stores, mover=mover, overwrite=True)
    assert (tmp_path / "a").read_text() == "new"


def test_a_target_that_cannot_be_written_is_named(
    place: Place, tmp_path: Path, mover: Mover
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match=r"cannot write .*file/a: "):
        fetch_datum(place.datum("a"), tmp_path / "file" / "a", stores=place.stores, mover=mover)


def test_a_malicious_datum_name_never_leaves_the_directory(
    place: Place, tmp_path: Path, mover: Mover
) -> None:
    with pytest.raises(StoreBadKey):
        local_path(tmp_path, place.datum("../../x"))
    (tmp_path / "x").write_text("")
    with pytest.raises(StoreBadKey):
        upload(place, tmp_path / "x", mover, name="../x")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/b c.txt", "b_c.txt"),
        ("-rf", "rf"),
        ("...", "file"),
        ("ä/日本", "__"),
        ("x" * 300, "x" * 100),
    ],
)
def test_names_in_keys_are_harmless(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_a_file_that_is_there_already_is_left_alone(
    place: Place, tmp_path: Path, mover: Mover
) -> None:
    datum = place.datum("a", b"same", sha256=hashlib.sha256(b"same").hexdigest())
    target = tmp_path / "a"
    target.write_text("same")
    before = target.stat().st_ino
    counted: list[int] = []
    fetch_datum(datum, target, stores=place.stores, mover=mover, progress=counted.append)
    assert (target.stat().st_ino, counted) == (before, [4])


PART = 5 * 1024 * 1024


@pytest.mark.parametrize("kind", ["s3", "swift"])
def test_large_files_go_in_parts_and_come_back(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, mover: Mover
) -> None:
    """S3 finishes an upload by a signed request, Swift has its parts joined by the control plane."""
    if kind == "s3":
        store: Store = s3_store(request.getfixturevalue("moto_server"), part_bytes=PART)
    else:
        store = swift_store(request.getfixturevalue("swift_server"), part_bytes=PART)
    path = tmp_path / "large"
    path.write_bytes(CONTENT * 5)
    datum = store_file(path, name="large", store=store, project_id="p1", now=NOW, mover=mover)
    stat = store.stat(datum.key)
    assert stat is not None
    assert stat.size == datum.size == len(CONTENT) * 5
    assert datum.sha256 == hashlib.sha256(CONTENT * 5).hexdigest()
    stores = Stores({store.name: store}, default=store.name)
    fetch_datum(datum, tmp_path / "back", stores=stores, mover=mover)
    assert (tmp_path / "back").read_bytes() == CONTENT * 5


def test_nothing_is_left_of_an_upload_that_was_stopped(moto_server: str, tmp_path: Path) -> None:
    store = s3_store(moto_server, part_bytes=PART)
    path = tmp_path / "large"
    path.write_bytes(CONTENT * 5)
    stop = threading.Event()
    stop.set()
    with Mover(stop) as mover, pytest.raises(StoreError):
        store_file(path, name="large", store=store, project_id="p1", now=NOW, mover=mover)
    assert list(store.list()) == []
    with closing(s3_client(moto_server)) as client:
        assert "Uploads" not in client.list_multipart_uploads(Bucket=store.place)


def test_a_missing_bucket_is_the_reason_and_not_what_cannot_be_cleaned_up(
    moto_server: str, tmp_path: Path, mover: Mover
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    store: Store = s3_store(moto_server, bucket="there-is-none")
    with pytest.raises(StoreMissing, match="NoSuchBucket") as caught:
        mover.send(tmp_path / "a", store, "data/a", name="a")
    assert "delete" not in str(caught.value)
