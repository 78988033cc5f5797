"""Inputs: every kind of URI, wildcards, placement, and what is refused when an execution is created."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.data.conftest import NOW, Place
from valohai_dagster.data import datasets, models
from valohai_dagster.data.aliases import set_alias
from valohai_dagster.data.datums import mark_purged
from valohai_dagster.data.input_spec import InputSpec
from valohai_dagster.data.placement import public_url
from valohai_dagster.data.resolve import Source, resolve_inputs
from valohai_dagster.data.survey import Pattern, Survey, look, remote_patterns
from valohai_dagster.data.version_wishes import ModelWish
from valohai_dagster.errors import ResolutionError, StoreUnavailable
from valohai_dagster.stores.base import ObjectStat
from valohai_dagster.stores.local import LocalStore
from valohai_dagster.stores.registry import Stores


def wanted(*uris: str, **changes: Any) -> InputSpec:
    return InputSpec(name="data", uris=list(uris), **changes)


def names(place: Place, *uris: str, **changes: Any) -> list[str]:
    return [file.name for file in place.resolve(wanted(*uris, **changes)).inputs[0].files]


def problems(place: Place, *inputs: InputSpec) -> list[str]:
    with pytest.raises(ResolutionError, match="inputs cannot be resolved") as caught:
        place.resolve(*inputs)
    return list(caught.value.problems)


# -- kinds of URI -----------------------------------------------------------------------------------------------


def test_a_datum_comes_with_all_that_is_known_of_it(place: Place) -> None:
    datum = place.datum("out/a.csv", b"12345", metadata={"color": "red"}, md5="cd" * 16)
    resolved = place.resolve(wanted(f"datum://{datum.id}"))
    (file,) = resolved.inputs[0].files
    assert (file.name, file.uri, file.size) == ("a.csv", f"datum://{datum.id}", 5)
    assert file.datum_id == datum.id
    assert (file.checksums.md5, file.checksums.sha256) == ("cd" * 16, "ab" * 32)
    assert file.cache_key == "sha256:" + "ab" * 32
    assert file.metadata == [{"color": "red"}]
    assert resolved.sources == {file.id: Source(store="local", key=datum.key)}


def test_i07_an_alias_gives_the_datum_it_points_to_now_in_this_project_only(place: Place) -> None:
    first, second = place.datum("a"), place.datum("b")
    with place.records.write() as connection:
        for datum in (first, second):
            set_alias(connection, project_id="p1", name="best model", datum_id=datum.id, now=NOW)
    (file,) = place.resolve(wanted("datum://best model")).inputs[0].files
    assert file.uri == f"datum://{second.id}", "the resolved id is kept, not the alias"
    place.project = "p2"
    assert "no datum alias 'best model'" in problems(place, wanted("datum://best model"))[0]


def test_http_urls_are_named_by_their_path_and_lose_their_credentials(place: Place) -> None:
    resolved = place.resolve(wanted("https://user:hunter2@h/a/b.csv?v=1"))
    (file,) = resolved.inputs[0].files
    assert (file.name, file.uri) == ("b.csv", public_url("https://h/a/b.csv?v=1"))
    assert (file.size, file.cache_key, file.datum_id) == (None, None, None)
    assert "hunter2" not in resolved.inputs[0].model_dump_json()
    assert resolved.sources[file.id].url == "https://user:hunter2@h/a/b.csv?v=1"
    assert "hunter2" not in repr(resolved)


def test_a_store_object_is_named_by_its_store(place: Place) -> None:
    place.put("sets/one.csv")
    resolved = place.resolve(wanted("store://local/sets/one.csv"))
    (file,) = resolved.inputs[0].files
    assert (file.name, file.uri, file.size) == ("one.csv", "store://local/sets/one.csv", 12)
    assert resolved.sources[file.id] == Source(store="local", key="sets/one.csv")


def test_i05_one_input_mixes_kinds_and_keeps_their_order(place: Place) -> None:
    place.put("s/b", "s/a")
    datum = place.datum("d")
    found = names(place, "https://h/z", "store://local/s/*", f"datum://{datum.id}")
    assert found == ["z", "a", "b", "d"]


def test_i01_a_dataset_version_gives_its_files_with_what_is_known_of_them(place: Place) -> None:
    first = place.datum("out/a.csv", metadata={"color": "red"})
    second = place.datum("out/b.csv", sha256=None, size=7)
    with place.records.write() as connection:
        version = datasets.create_version(
            connection,
            project_id="p1",
            uri="dataset://set/v1",
            datum_ids=[first.id, second.id],
            now=NOW,
        )
        datasets.point_alias(connection, version, name="best", now=NOW)
    for uri in ("dataset://set/v1", "dataset://set/best", "dataset://set/latest"):
        resolved = place.resolve(wanted(uri))
        a, b = resolved.inputs[0].files
        assert (a.name, a.uri, a.metadata) == ("a.csv", first.uri, [{"color": "red"}])
        assert a.cache_key == "sha256:" + "ab" * 32
        assert (b.name, b.cache_key) == ("b.csv", f"{second.uri}@7")
        assert resolved.sources[b.id] == Source(store="local", key=second.key)
        assert set(resolved.asked.values()) == {uri}
    assert names(place, "dataset://set/v1", keep_directories="full") == ["out/a.csv", "out/b.csv"]


def test_i01_i08_a_model_version_gives_its_files(place: Place) -> None:
    weights = place.datum("weights")
    with place.records.write() as connection:
        wish = ModelWish(slug="net")
        made = models.create_version(
            connection, wish, project_id="p1", datum_ids=[weights.id], now=NOW
        )
    assert names(place, "model://net/1") == ["weights"]
    assert "is approved" in problems(place, wanted("model://net/latest"))[0]
    with place.records.write() as connection:
        models.decide(connection, made, approved=True, now=NOW)
    assert names(place, "model://net/latest") == ["weights"]


def test_i38_a_purged_file_of_a_dataset_is_named(place: Place) -> None:
    gone = place.datum("gone.csv")
    with place.records.write() as connection:
        datasets.create_version(
            connection, project_id="p1", uri="dataset://d/v", datum_ids=[gone.id], now=NOW
        )
        mark_purged(connection, [gone.id])
    (found,) = problems(place, wanted("dataset://d/v"))
    assert found.startswith("input 'data': dataset://d/v: ")
    assert f"{gone.uri} (gone.csv): the content was purged" in found


def test_an_object_names_the_version_of_its_content(place: Place) -> None:
    place.put("sets/one.csv")
    (file,) = place.resolve(wanted("store://local/sets/one.csv")).inputs[0].files
    stat = place.stores.default.stat("sets/one.csv")
    assert stat is not None
    assert file.cache_key == f"store://local/sets/one.csv@{stat.version}"


class CountingStore(LocalStore):
    """A directory that stands for a store behind a network and counts what it is asked."""

    kind = "s3"

    def __init__(self, name: str, root: Path) -> None:
        super().__init__(name, root)
        self.asked: list[str] = []

    def list(self, prefix: str = "") -> Iterator[ObjectStat]:
        self.asked.append(prefix)
        return super().list(prefix)


def test_i03_a_store_is_listed_once_per_pattern(place: Place) -> None:
    root: Any = place.stores.default
    remote = CountingStore("far", root.root)
    place.stores = Stores({"far": remote}, default="far")
    place.put("s/a", "s/b")
    specs = [
        InputSpec(name=name, uris=["store://far/s/*", "store://far/s/a"]) for name in ("x", "y")
    ]
    patterns = remote_patterns(specs, place.stores)
    assert patterns == [Pattern(store="far", key="s/*"), Pattern(store="far", key="s/a")]
    answers = {pattern: look(remote, pattern) for pattern in patterns}
    assert remote.asked == ["s/"]
    with place.records.read() as connection:
        resolve_inputs(
            specs,
            connection=connection,
            stores=place.stores,
            group=place.group,
            project_id="p1",
            survey=Survey(place.stores, answers),
        )
    assert remote.asked == ["s/"]
    place.resolve(*specs)
    assert remote.asked == ["s/", "s/"], "without answers it is asked, once"


def test_i38_what_a_store_has_answered_refuses_the_input(place: Place) -> None:
    pattern = Pattern(store="local", key="s/*")
    down = StoreUnavailable("the store 'local' cannot be reached", store="local")
    with (
        place.records.read() as connection,
        pytest.raises(
            ResolutionError, match=r"'data': store://local/s/\*: the store 'local' cannot"
        ),
    ):
        resolve_inputs(
            [wanted("store://local/s/*")],
            connection=connection,
            stores=place.stores,
            group=place.group,
            project_id="p1",
            survey=Survey(place.stores, {pattern: down}),
        )


def test_a_listing_is_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("valohai_dagster.data.survey.MAX_FILES", 2)
    monkeypatch.setattr("valohai_dagster.data.survey.MAX_LISTED", 3)
    place.put("s/a", "s/b", "s/c", "s/d.x", "s/e.x")
    assert "more than 2 files match" in problems(place, wanted("store://local/s/*"))[0]
    assert "more than 3 objects lie below" in problems(place, wanted("store://local/s/*.x"))[0]


# -- wildcards and placement ------------------------------------------------------------------------------------

SET = ("foo/bar/a.jpg", "foo/bar/ds1/a2.jpg", "foo/bar/ds1/b.png", "foo/c.jpg")


@pytest.mark.parametrize(
    ("uri", "keep", "expected"),
    [
        ("store://local/foo/bar/**.jpg", "none", ["a.jpg", "a2.jpg"]),
        ("store://local/foo/bar/**.jpg", "suffix", ["a.jpg", "ds1/a2.jpg"]),
        ("store://local/foo/bar/**.jpg", "full", ["foo/bar/a.jpg", "foo/bar/ds1/a2.jpg"]),
        ("store://local/foo/bar/*.jpg", "suffix", ["a.jpg"]),
        ("store://local/foo/bar/*", "none", ["a.jpg"]),
        ("store://local/foo/bar/*", "suffix", ["a.jpg", "ds1/a2.jpg", "ds1/b.png"]),
        ("store://local/foo/bar/", "suffix", ["a.jpg", "ds1/a2.jpg", "ds1/b.png"]),
        ("store://local/foo/**/*.jpg", "suffix", ["bar/a.jpg", "bar/ds1/a2.jpg", "c.jpg"]),
        ("store://local/foo/c.jpg", "suffix", ["c.jpg"]),
        ("store://local/foo/c.jpg", "full", ["foo/c.jpg"]),
    ],
)
def test_i03_i06_i21_wildcards_over_a_store(
    place: Place, uri: str, keep: str, expected: list[str]
) -> None:
    place.put(*SET)
    assert names(place, uri, keep_directories=keep) == expected


def test_i22_a_datum_keeps_its_directories_when_asked(place: Place) -> None:
    datum = place.datum("out/sub/a.csv")
    assert names(place, datum.uri) == ["a.csv"]
    assert names(place, datum.uri, keep_directories="suffix") == ["out/sub/a.csv"]


def test_i23_of_two_files_with_one_path_the_last_wins_with_a_warning(place: Place) -> None:
    place.put("x/same", "y/same")
    resolved = place.resolve(wanted("store://local/x/same", "store://local/y/same"))
    (file,) = resolved.inputs[0].files
    assert file.uri == "store://local/y/same"
    assert list(resolved.sources) == [file.id]
    assert len(resolved.warnings) == 1
    assert "'same'" in resolved.warnings[0]


def test_i24_filename_renames_a_single_file_and_is_ignored_for_several(place: Place) -> None:
    place.put("s/a", "s/b")
    assert names(place, "store://local/s/a", filename="model.pkl") == ["model.pkl"]
    resolved = place.resolve(wanted("store://local/s/*", filename="model.pkl"))
    assert [file.name for file in resolved.inputs[0].files] == ["a", "b"]
    assert "'model.pkl' is ignored, the input has 2 files" in resolved.warnings[0]


def test_ids_are_unique_over_all_inputs(place: Place) -> None:
    place.put("s/a", "s/b")
    resolved = place.resolve(
        wanted("store://local/s/*"), InputSpec(name="other", uris=["store://local/s/*"])
    )
    ids = [file.id for item in resolved.inputs for file in item.files]
    assert len(set(ids)) == 4 == len(resolved.sources)


def test_i37_i38_optional_inputs_may_be_empty(place: Place) -> None:
    empty = InputSpec(name="none", optional=True)
    nothing = InputSpec(name="glob", uris=["store://local/no/**"], optional=True)
    lazy = InputSpec(name="lazy", uris=["https://h/x"], download="on-demand")
    resolved = place.resolve(empty, nothing, lazy)
    assert [len(item.files) for item in resolved.inputs] == [0, 0, 1]
    assert resolved.inputs[2].download == "on-demand"


# -- refusals ---------------------------------------------------------------------------------------------------


def test_i38_every_problem_is_told_at_once_with_its_uri(place: Place) -> None:
    purged = place.datum("gone.csv")
    with place.records.write() as connection:
        mark_purged(connection, [purged.id])
    unknown = "00000000-0000-4000-8000-000000000000"
    found = problems(
        place,
        wanted(f"datum://{unknown}", purged.uri, "datum://no-alias", "https://h/ok"),
        InputSpec(name="glob", uris=["store://local/no/**.jpg"]),
        InputSpec(name="required"),
    )
    assert len(found) == 5
    assert f"datum://{unknown}: there is no datum with this id" in found[0]
    assert f"{purged.uri}" in found[1]
    assert "was purged" in found[1]
    assert "no datum alias 'no-alias'" in found[2]
    assert "input 'glob' is required, but no file matches store://local/no/**.jpg" in found[3]
    assert "input 'required' is required and has no URI" in found[4]


def test_i38_a_pattern_without_files_is_told_beside_what_else_is_wrong(place: Place) -> None:
    place.put("sets/one.csv")
    missing, empty = "store://local/no/file", "store://local/no/*.jpg"
    found = problems(place, wanted(missing, empty, "store://local/sets/*"))
    assert len(found) == 2
    assert missing in found[0]
    assert found[1] == f"input 'data': {empty}: no file matches"
    resolved = place.resolve(wanted(empty, "store://local/sets/*"))
    assert len(resolved.inputs[0].files) == 1
    assert resolved.warnings == [f"input 'data': {empty}: no file matches"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("store://gone/a", r"there is no such store; known are local"),
        ("store://local/no/file", "there is no such file"),
        ("store://local/../../etc/passwd", "refused"),
        ("s3://bucket/key", r'no store .* serve store://local. .*kind = "s3", bucket = "bucket"'),
        ("gs://bucket/key", r'kind = "gcs", bucket = "bucket"'),
        ("azure://acc/cont/k", r'kind = "azure", account = "acc", container = "cont"'),
        ("swift://proj/cont/k", r'kind = "swift", project = "proj", container = "cont"'),
        ("dataset://a/b", "this project has no dataset 'a'; known are none"),
        ("model://a/1", "this project has no model 'a'; known are none"),
        ("just/a/path", "not an input URI; known are"),
        ("", "not an input URI"),
        ("ftp://h/a", "not an input URI"),
        ("http:///path", "the URL has no host"),
        ("http://h:port/path", "[Pp]ort"),
        ("http://u:hunter2@[bad/path", "Invalid IPv6"),
        ("http://h/a\nb", "line break"),
        ("datum://", "no datum alias ''"),
        ("file://relative/a", "three slashes"),
        ("file:///data/../etc/passwd", "must not contain '..'"),
        ("file:///etc/passwd", r"may not read /etc .*file_inputs = \['/etc'\]"),
    ],
)
def test_what_cannot_be_resolved_is_refused_with_its_uri(
    place: Place, uri: str, expected: str
) -> None:
    import re

    (found,) = problems(place, wanted(uri))
    assert found.startswith("input 'data': ")
    assert re.search(expected, found), found


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/abs", "a\0b", ".."])
def test_a_malicious_datum_name_never_becomes_a_path(place: Place, name: str) -> None:
    datum = place.datum(name)
    found = problems(place, wanted(datum.uri, keep_directories="full"))
    assert "cannot be placed" in found[0]


def test_a_filename_that_leaves_the_directory_is_refused(place: Place) -> None:
    assert "cannot be placed" in problems(place, wanted("https://h/a", filename="../../x"))[0]


def test_credentials_of_a_url_that_is_refused_are_not_shown(place: Place) -> None:
    for url in ("http://u:hunter2@:80/x", "http://u:hunter2/x@h/x", "http://:80/x?key=hunter2"):
        (found,) = problems(place, wanted(url))
        assert "hunter2" not in found


# -- directories of the host ------------------------------------------------------------------------------------


@pytest.fixture
def data(place: Place, tmp_path: Path) -> Path:
    folder = tmp_path / "my data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.csv").write_text("1")
    (folder / "sub" / "b.csv").write_text("22")
    place.group = place.group.model_copy(update={"file_inputs": [folder]})
    return folder


def test_files_of_an_allowed_directory_are_read_where_they_are(place: Place, data: Path) -> None:
    resolved = place.resolve(wanted(f"{data.as_uri()}/**.csv", keep_directories="suffix"))
    files = resolved.inputs[0].files
    assert [(file.name, file.size) for file in files] == [("a.csv", 1), ("sub/b.csv", 2)]
    assert files[0].uri == (data / "a.csv").as_uri()
    assert resolved.sources[files[0].id] == Source(url=(data / "a.csv").as_uri())
    assert names(place, f"file://{data}/a.csv") == ["a.csv"], "blanks may stand as they are"


def test_links_out_of_the_allowed_directory_are_left_out_and_named(
    place: Place, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    (data / "link.csv").symlink_to(tmp_path / "secret")
    (data / "out").symlink_to("/etc")
    resolved = place.resolve(wanted(f"{data.as_uri()}/*.csv"))
    assert [file.name for file in resolved.inputs[0].files] == ["a.csv"]
    assert "link.csv" in resolved.warnings[0]
    assert "may not read" in problems(place, wanted(f"{data.as_uri()}/out/hostname"))[0]


def test_mounts_allowed_opens_all_directories_of_a_local_group_only(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("1")
    uri = (tmp_path / "x").as_uri()
    place.group = place.group.model_copy(update={"mounts_allowed": True})
    assert names(place, uri) == ["x"]
    place.group = place.group.model_copy(update={"kind": "static"})
    assert "may not read" in problems(place, wanted(uri))[0]


def test_a_file_url_below_a_store_belongs_to_the_store(place: Place) -> None:
    place.put("sets/a")
    root: Any = place.stores.default
    resolved = place.resolve(wanted((root.root / "sets" / "a").as_uri()))
    assert resolved.inputs[0].files[0].uri == "store://local/sets/a"
