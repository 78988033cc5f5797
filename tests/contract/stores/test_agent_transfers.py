"""The agent's transfer engine against every store that workers reach by HTTP, by the very grants that they get."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.contract.stores.conftest import Put
from valohai_agent.errors import Conflict, Denied, NotFound
from valohai_agent.protocol import Checksums, Parts, UploadGrant
from valohai_agent.transfer import SmallDownload, SmallUpload, Transferer
from valohai_dagster.errors import StoreConflict
from valohai_dagster.stores.base import JoiningStore, PartedUpload, Store

HOUR = timedelta(hours=1)
MIB = 1024 * 1024


@pytest.fixture
def file(tmp_path: Path) -> Callable[[int], Path]:
    """A file of that many bytes, whose content no two parts share."""

    def make(size: int) -> Path:
        path = tmp_path / f"{size}.bin"
        path.write_bytes(random.Random(size).randbytes(size))
        return path

    return make


def grant_for(store: Store, key: str, size: int) -> tuple[UploadGrant, PartedUpload | None]:
    """What the control plane answers: the first two parts at once, as if there were too many for one answer."""
    transfer = store.sign_put(key, expires=HOUR, size=size)
    upload = store.begin_parts(key, size=size)
    parts = store.sign_parts(key, upload, [1, 2], expires=HOUR) if upload else None
    return UploadGrant(upload_id="u", transfer=transfer, parts=parts), upload


def upload(engine: Transferer, store: Store, key: str, source: Path) -> Checksums:
    size = source.stat().st_size
    grant, begun = grant_for(store, key, size)

    def more(first: int, count: int) -> Parts:
        assert begun is not None
        if not count and isinstance(store, JoiningStore):
            store.join_parts(key, begun, size=size)
        return store.sign_parts(key, begun, range(first, first + count), expires=HOUR)

    return engine.upload(source, grant, name=key, more=more).checksums


@pytest.mark.parametrize(
    "size", [0, 5, 12 * MIB, 12 * MIB + 7], ids=["empty", "small", "even", "odd"]
)
def test_what_the_agent_uploads_it_downloads_again(
    remote: Store, file: Callable[[int], Path], tmp_path: Path, size: int
) -> None:
    engine, source, target = Transferer(), file(size), tmp_path / "again"
    sent = upload(engine, remote, "out/a b.bin", source)
    found = remote.stat("out/a b.bin")
    assert found is not None
    assert found.size == size
    received = engine.download(
        remote.sign_get("out/a b.bin", expires=HOUR), target, name="a", expected=sent, size=size
    )
    assert received.checksums == sent
    assert sent.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert target.read_bytes() == source.read_bytes()
    engine.close()


def test_many_small_files_go_by_a_lane_both_ways(
    remote: Store, file: Callable[[int], Path], tmp_path: Path
) -> None:
    """None comes back undone: the lane understands how each store takes, answers and gives a file."""
    engine, sizes = Transferer(), [0, 1, 300, 70_000, MIB]
    uploads = {
        f"out/dir {size}/é.bin": SmallUpload(
            opens=functools.partial(file(size).open, "rb"),
            grant=UploadGrant(
                upload_id="u",
                transfer=remote.sign_put(f"out/dir {size}/é.bin", expires=HOUR, size=size),
            ),
            name=str(size),
        )
        for size in sizes
    }
    sent = {one.name: moved for one, moved in engine.upload_small(uploads.values())}
    assert all(sent.values())
    downloads = [
        SmallDownload(
            transfer=remote.sign_get(key, expires=HOUR), target=tmp_path / one.name, name=one.name
        )
        for key, one in uploads.items()
    ]
    received = {one.name: moved for one, moved in engine.download_small(downloads)}
    engine.close()
    for size in sizes:
        given, taken = sent[str(size)], received[str(size)]
        assert given is not None
        assert taken is not None
        assert given.checksums == taken.checksums
        assert (tmp_path / str(size)).read_bytes() == file(size).read_bytes()


@pytest.mark.parametrize("size", [5, 12 * MIB], ids=["small", "parts"])
def test_o02_the_agent_overwrites_nothing(
    remote: Store, needs: Callable[[str], None], file: Callable[[int], Path], size: int
) -> None:
    needs("conditions")
    engine = Transferer()
    remote.put("taken", b"first")
    refusals = (Conflict, StoreConflict)  # the second where the control plane joins the parts
    if remote.kind == "azure":
        refusals += (Denied,)  # a signature that may only create is no permission to overwrite
    with pytest.raises(refusals):
        upload(engine, remote, "taken", file(size))
    assert remote.open("taken").read() == b"first"
    engine.close()


def test_a_missing_input_is_not_found(remote: Store, tmp_path: Path) -> None:
    engine = Transferer()
    with pytest.raises(NotFound):
        engine.download(
            remote.sign_get("no/such", expires=HOUR), tmp_path / "target", name="no/such"
        )
    assert list(tmp_path.iterdir()) == []
    engine.close()


def test_i33_what_the_agent_downloads_tells_its_version_as_the_store_does(
    source: tuple[Store, Put], tmp_path: Path
) -> None:
    """So that a cache knows which version it holds, whatever was looked up before."""
    engine, (store, put) = Transferer(), source
    found = []
    for key in ("first", "second one"):
        put(key, key.encode())
        stat = store.stat(key)
        assert stat is not None
        moved = engine.download(store.sign_get(key, expires=HOUR), tmp_path / key, name=key)
        found.append((stat.version, moved.version))
    for known, met in found:
        assert [met.confirms(version) for version, _ in found] == [
            version == known for version, _ in found
        ]
        assert {met.like(version) for version, _ in found} == {known}
    engine.close()
