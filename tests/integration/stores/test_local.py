"""The local store on a real file system: permissions, full disks, links, grants, settings."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from valohai_dagster.errors import (
    StoreBadKey,
    StoreConflict,
    StoreFull,
    StoreNotWritable,
    StoreUnavailable,
    StoreUnknown,
)
from valohai_dagster.settings import Settings
from valohai_dagster.stores import local
from valohai_dagster.stores.local import LocalStore
from valohai_dagster.stores.registry import open_stores

HOUR = timedelta(hours=1)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore("main", tmp_path / "my store")


def test_grants_are_file_urls_below_the_store(store: LocalStore) -> None:
    put = store.sign_put("data/a b%c.txt", expires=HOUR)
    assert put.url.startswith("file:///")
    path = Path(unquote(urlsplit(put.url).path))
    assert path == store.root / "data" / "a b%c.txt"
    assert path.parent.is_dir(), "the worker finds the directory made"
    path.write_bytes(b"x")
    assert store.sign_get("data/a b%c.txt", expires=HOUR).url == put.url
    with pytest.raises(StoreConflict, match="never overwrite"):
        store.sign_put("data/a b%c.txt", expires=HOUR)


def test_a_grant_that_cannot_fit_is_refused_at_once(store: LocalStore) -> None:
    with pytest.raises(StoreFull, match=r"cannot write 'big'.*free space"):
        store.sign_put("big", expires=HOUR, size=1 << 60)


def test_disk_full_while_writing_is_said_and_leaves_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, source: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local, "_write_durably", full)
    with pytest.raises(StoreFull, match="No space left"):
        store.put("a", b"content")
    assert list(store.list()) == []
    assert list(store.root.iterdir()) == []


NOT_WRITABLE = """
import sys, os
from datetime import timedelta
from pathlib import Path
from valohai_dagster.stores.local import LocalStore
from valohai_dagster.errors import StoreNotWritable
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
store = LocalStore("main", Path(sys.argv[1]))
for attempt in (lambda: store.put("a/b", b"x"), lambda: store.sign_put("a/b", expires=timedelta(1))):
    try:
        attempt()
    except StoreNotWritable as error:
        print(error)
"""


def test_a_store_that_is_not_writable_says_so_when_a_grant_is_minted(short_tmp: Path) -> None:
    short_tmp.chmod(0o755)
    root = short_tmp / "store"
    root.mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, "-c", NOT_WRITABLE, str(root)], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert f"the store 'main' ({root}) cannot write 'a/b': Permission denied" in line
        assert "[stores.main]" in line
        assert "doctor" in line


def test_a_root_that_is_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreNotWritable, match="cannot write"):
        LocalStore("main", tmp_path / "file").put("a", b"x")


def test_a_readonly_store_is_never_written_and_its_missing_mount_is_no_empty_store(
    tmp_path: Path,
) -> None:
    store = LocalStore("mounted", tmp_path / "mnt", readonly=True)
    with pytest.raises(StoreUnavailable, match="is its mount missing"):
        list(store.list())
    with pytest.raises(StoreUnavailable, match="is its mount missing"):
        store.stat("a")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt" / "a").write_text("x")
    assert [item.key for item in store.list()] == ["a"]
    for write in (
        lambda: store.put("b", b""),
        lambda: store.delete("a"),
        lambda: store.sign_put("b", expires=HOUR),
    ):
        with pytest.raises(StoreNotWritable, match="readonly"):
            write()


def test_links_out_of_the_store_are_refused(store: LocalStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("x")
    store.put("ok", b"x")
    (store.root / "out").symlink_to(secret)
    (store.root / "file").symlink_to(secret / "key")
    (store.root / "in").symlink_to(store.root / "ok")
    for key in ("out/key", "file"):
        with pytest.raises(StoreBadKey, match="symbolic link"):
            store.open(key)
        with pytest.raises(StoreBadKey, match="symbolic link"):
            store.sign_get(key, expires=HOUR)
    with store.open("in") as file:
        assert file.read() == b"x"


def test_listing_leaves_out_links_that_leave_and_unfinished_writes(
    store: LocalStore, tmp_path: Path
) -> None:
    store.put("a", b"x")
    (store.root / f".{'0af1' * 8}.part").write_text("half")
    (store.root / "dangling").symlink_to(tmp_path / "nowhere")
    (store.root / "out").symlink_to("/etc/hostname")
    (store.root / "loop").symlink_to(store.root)
    assert [item.key for item in store.list()] == ["a"]


def test_i02_a_file_url_below_the_directory_belongs_to_the_store(store: LocalStore) -> None:
    root = store.root.as_uri()
    assert store.key_of(f"{root}/sets/**.jpg") == "sets/**.jpg"
    assert store.key_of("file:///elsewhere/a") is None
    assert store.key_of("store://main/a%20b") == "a%20b"
    assert store.key_of("store://other/a") is None


def test_registry_opens_configured_stores_and_names_unknown_ones(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {
            "state_dir": tmp_path,
            "stores": {
                "big": {"path": str(tmp_path / "big")},
                "in": {"path": str(tmp_path / "big/in")},
            },
            "default_store": "big",
            "log_store": "local",
        }
    )
    stores = open_stores(settings)
    assert (stores.default.name, stores.code.name, stores.log.name) == ("big", "big", "local")
    assert sorted(stores) == ["big", "in", "local"]
    assert "big" in stores
    assert "gone" not in stores
    with pytest.raises(StoreUnknown, match=r"no store 'gone'.*big, in, local.*\[stores.gone\]"):
        stores["gone"]
    served = stores.serving(f"file://{tmp_path}/big/in/x/y")
    assert served is not None
    assert (served[0].name, served[1]) == ("in", "x/y"), "the deepest directory serves"
