"""I-40: a datum never changes, so an adopted object that was replaced in its store is not handed out for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.integration.data.conftest import NOW, Place
from tests.support.servers.s3_stores import s3_client, s3_store
from valohai_agent.protocol import Checksums
from valohai_dagster.data.adoption import adopt, find_candidates
from valohai_dagster.data.datums import Datum
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.package_writing import _unchanged
from valohai_dagster.data.transfers import Mover, fetch_datum
from valohai_dagster.errors import RefusedError
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import Stores


class Bucket:
    """A store with one object that was adopted, and a way to write over it, which stores themselves do not have."""

    def __init__(self, place: Place, store: Store, stores: Stores, endpoint: str | None) -> None:
        self.place, self.store, self.stores, self.endpoint = place, store, stores, endpoint
        store.put("raw/a.txt", b"hello 0")

    def overwrite(self, content: bytes) -> None:
        if self.endpoint is None:
            url = self.store.sign_get("raw/a.txt", expires=timedelta(minutes=1)).url
            path = Path(unquote(urlsplit(url).path))
            later = path.stat().st_mtime_ns + 10**9  # two writes may have one time
            path.write_bytes(content)
            os.utime(path, ns=(later, later))
            return
        with closing(s3_client(self.endpoint)) as client:
            bucket = self.store.uri("").split("/")[2]
            client.put_object(Bucket=bucket, Key="raw/a.txt", Body=content)

    def adopt(self) -> Datum:
        candidates, missing = find_candidates([self.store.uri("raw/a.txt")], self.stores)
        assert not missing
        done = adopt(self.place.records, candidates, project_id="p1", now=NOW)
        (datum,) = [*done.created.values(), *done.existing.values()]
        return datum


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.stores)])
def bucket(request: pytest.FixtureRequest, place: Place) -> Iterator[Bucket]:
    if request.param == "local":
        yield Bucket(place, place.stores.default, place.stores, None)
        return
    endpoint = request.getfixturevalue("moto_server")
    remote = s3_store(endpoint)
    yield Bucket(place, remote, Stores({remote.name: remote}, default=remote.name), endpoint)


def fetch(bucket: Bucket, datum: Datum, target: Path) -> None:
    with Mover() as mover:
        fetch_datum(datum, target, stores=bucket.stores, mover=mover)


def test_i40_a_replaced_object_is_refused_and_leaves_nothing(
    bucket: Bucket, tmp_path: Path
) -> None:
    datum = bucket.adopt()
    stat = bucket.store.stat("raw/a.txt")
    assert stat is not None
    assert datum.version == stat.version
    fetch(bucket, datum, tmp_path / "out" / "a.txt")
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"hello 0"
    bucket.overwrite(b"hello X")
    for number, broken in enumerate((b"hello X", b"another size")):
        bucket.overwrite(broken)
        with pytest.raises(RefusedError, match=r"was replaced since it was adopted.*data adopt"):
            fetch(bucket, datum, tmp_path / str(number) / "a.txt")
        assert not list((tmp_path / str(number)).iterdir())
    with pytest.raises(RefusedError, match="was replaced"):
        _unchanged(datum, bucket.stores)


def test_i40_a_known_sha256_says_more_than_the_version(bucket: Bucket, tmp_path: Path) -> None:
    """Writing the same content again changes the versions of some stores, and no content."""
    datum = bucket.adopt()
    with Mover() as mover:
        moved = mover.fetch(bucket.store, datum.key, tmp_path / "x", name="x", expected=Checksums())
    known = replace(datum, version="another", **moved.checksums.model_dump())
    fetch(bucket, known, tmp_path / "a")
    bucket.overwrite(b"hello X")
    with pytest.raises(RefusedError, match="was replaced"):
        fetch(bucket, known, tmp_path / "b")


def test_i40_what_replaced_it_is_adopted_as_another_datum(bucket: Bucket, tmp_path: Path) -> None:
    first = bucket.adopt()
    assert bucket.adopt().id == first.id
    bucket.overwrite(b"hello X")
    second = bucket.adopt()
    assert second.id != first.id
    fetch(bucket, second, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"hello X"


def test_i32_workers_are_told_which_version_was_adopted(place: Place) -> None:
    datum = place.datum("a.csv", sha256=None, adopted=True, version="9a3f")
    resolved = place.resolve(InputSpec(name="d", uris=[datum.uri]))
    (file,) = resolved.inputs[0].files
    assert file.cache_key == f"{datum.uri}@9a3f"
