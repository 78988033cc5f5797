"""Versions of datasets and models: made by executions and by people, aliases, approval."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.integration.data.conftest import NOW, Place
from valohai_dagster.data import datasets, models, packages
from valohai_dagster.data.datums import Datum, mark_purged
from valohai_dagster.data.sidecar_effects import apply_sidecar_effects
from valohai_dagster.data.version_effects import executions_with_versions, settle_versions
from valohai_dagster.data.version_wishes import ModelWish
from valohai_dagster.errors import NotFoundError, RefusedError

pytestmark = pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)

V = "valohai.dataset-versions"
M = "valohai.model-versions"


def output(place: Place, name: str, execution: str = "e1", **metadata: Any) -> Datum:
    """A stored output with its effects, as the service applies them; warnings are put on the datum."""
    named = {f"valohai.{key.replace('_', '-')}": value for key, value in metadata.items()}
    datum = place.datum(name, execution_id=execution, metadata=named)
    datum.properties["warnings"] = again(place, datum)
    return datum


def again(place: Place, datum: Datum) -> list[str]:
    with place.records.write() as connection:
        return apply_sidecar_effects(
            connection,
            datum_id=datum.id,
            project_id="p1",
            execution_id=datum.execution_id or "",
            metadata=datum.metadata,
            now=NOW,
        )


def settle(place: Place, execution: str = "e1", hours: int = 1) -> list[str]:
    with place.records.write() as connection:
        return settle_versions(connection, execution, NOW + timedelta(hours=hours)).warnings


def names(place: Place, uri: str) -> list[str]:
    with place.records.read() as connection:
        version = datasets.get_version(connection, uri, project_id="p1")
        return [datum.name for datum in datasets.files_of(connection, version.id)]


def dataset(place: Place, uri: str) -> datasets.DatasetVersion:
    with place.records.read() as connection:
        return datasets.get_version(connection, uri, project_id="p1")


def model(place: Place, uri: str) -> models.ModelVersion:
    with place.records.read() as connection:
        return models.get_version(connection, uri, project_id="p1")


def test_o11_o12_all_files_of_an_execution_make_one_version_of_a_new_dataset(place: Place) -> None:
    for name in ("a", "sub/b"):
        made = output(place, name, dataset_versions=["dataset://faces/v1"])
        assert made.properties["warnings"] == []
    output(place, "c")
    with pytest.raises(RefusedError, match="execution e1 is still making this version"):
        dataset(place, "dataset://faces/v1")
    assert settle(place) == []
    assert names(place, "dataset://faces/v1") == ["a", "sub/b"]
    assert dataset(place, "dataset://faces/v1").execution_id == "e1"


def test_o11_saying_it_again_and_ending_again_changes_nothing(place: Place) -> None:
    datum = output(place, "a", dataset_versions=["dataset://d/v"], model_versions=["model://m/"])
    assert again(place, datum) == []
    with place.records.read() as connection:
        assert executions_with_versions(connection, ["e1", "e2"]) == ["e1"]
    settle(place)
    with place.records.read() as connection:
        assert executions_with_versions(connection, ["e1", "e2"]) == []
    assert settle(place) == []
    assert names(place, "dataset://d/v") == ["a"]
    assert model(place, "model://m/1").number == 1


def test_o11_a_version_of_another_execution_takes_nothing_and_the_datum_stays(place: Place) -> None:
    output(place, "a", dataset_versions=["dataset://d/v"])
    early = output(place, "b", "e2", dataset_versions=["dataset://d/v"])
    assert "is being made by execution e1" in early.properties["warnings"][0]
    settle(place)
    late = output(place, "c", "e2", dataset_versions=["dataset://d/v"])
    (warning,) = late.properties["warnings"]
    assert "was made by execution e1" in warning
    assert "Choose another version name" in warning
    assert settle(place, "e2") == []
    assert names(place, "dataset://d/v") == ["a"]


def test_o10_from_exclude_and_start_fresh(place: Place) -> None:
    for name in ("a", "b", "c"):
        output(place, name, dataset_versions=["dataset://d/v1"])
    settle(place)
    wish = {"uri": "dataset://d/v2", "from": "dataset://d/v1", "exclude": ["b", "x"]}
    output(place, "c", "e2", dataset_versions=[wish])
    (warning,) = settle(place, "e2")
    assert "no carried file has the name 'x'" in warning
    assert names(place, "dataset://d/v2") == ["a", "c"]
    with place.records.read() as connection:
        version = datasets.get_version(connection, "dataset://d/v2", project_id="p1")
        found = {d.name: d.execution_id for d in datasets.files_of(connection, version.id)}
    assert found == {"a": "e1", "c": "e2"}, "the new file replaces the carried one of its name"
    fresh = {"uri": "dataset://d/v3", "from": "v1", "start_fresh": True}
    output(place, "z", "e3", dataset_versions=[fresh])
    settle(place, "e3")
    assert names(place, "dataset://d/v3") == ["z"]


def test_o10_a_wrong_from_is_named_and_the_version_is_made(place: Place) -> None:
    wish = {"uri": "dataset://d/v2", "from": "nope"}
    made = output(place, "a", dataset_versions=[wish])
    (warning,) = made.properties["warnings"]
    assert "nothing is carried over" in warning
    assert "no version or alias 'nope'" in warning
    settle(place)
    assert names(place, "dataset://d/v2") == ["a"]


def test_o10_aliases_move_and_tags_are_set_when_the_version_closes(place: Place) -> None:
    wish: dict[str, Any] = {"targeting_aliases": ["best"], "valohai.tags": ["dev"]}
    output(place, "a", dataset_versions=[{"uri": "dataset://d/v1", **wish}])
    with pytest.raises(NotFoundError):
        dataset(place, "dataset://d/best")
    settle(place)
    assert dataset(place, "dataset://d/best").name == "v1"
    output(place, "b", "e2", dataset_versions=[{"uri": "dataset://d/v2", **wish}])
    settle(place, "e2")
    found = dataset(place, "dataset://d/best")
    assert (found.name, found.tags) == ("v2", ["dev"])
    with place.records.read() as connection:
        history = datasets.alias_history(connection, found.dataset_id, "best")
        first = datasets.version_by_id(connection, history[0]["version_id"])
    assert len(history) == 2
    assert first is not None
    assert first.name == "v1"


def test_t16_latest_is_the_alias_of_that_name_else_the_newest_closed_version(place: Place) -> None:
    for number in (1, 2):
        output(place, "a", f"e{number}", dataset_versions=[f"dataset://d/v{number}"])
        settle(place, f"e{number}", hours=number)
    output(place, "a", "e3", dataset_versions=["dataset://d/v3"])
    assert dataset(place, "dataset://d/latest").name == "v2", "v3 is not closed yet"
    with place.records.write() as connection:
        first = datasets.get_version(connection, "dataset://d/v1", project_id="p1")
        datasets.point_alias(connection, first, name="latest", now=NOW)
    assert dataset(place, "dataset://d/latest").name == "v1"


def test_files_of_a_lost_attempt_do_not_count(place: Place) -> None:
    lost = output(place, "a", dataset_versions=["dataset://d/v", "dataset://d/only-lost"])
    output(place, "only", "e1", model_versions=["model://m/"])
    with place.records.write() as connection:
        from valohai_dagster.records.tables import datums

        connection.execute(datums.update().values(withdrawn=True))
    kept = output(place, "a", dataset_versions=["dataset://d/v"])
    settle(place)
    with place.records.read() as connection:
        version = datasets.get_version(connection, "dataset://d/v", project_id="p1")
        assert [d.id for d in datasets.files_of(connection, version.id)] == [kept.id] != [lost.id]
        found = datasets.get_dataset(connection, "p1", "d")
        assert [v.name for v in datasets.list_versions(connection, found.id)] == ["v"]
        assert models.list_versions(connection, models.get_model(connection, "p1", "m").id) == []


def test_purged_files_are_left_out_of_a_version_and_named(place: Place) -> None:
    for name in ("kept", "gone", "replaced", "excluded"):
        output(place, name, "e0", dataset_versions=["dataset://d/base"])
    settle(place, "e0")
    wish = {"uri": "dataset://d/v", "from": "base", "exclude": ["excluded"]}
    own = output(place, "replaced", dataset_versions=[wish])
    purged = output(place, "own", dataset_versions=[wish, "dataset://d/only"])
    with place.records.write() as connection:
        base = datasets.get_version(connection, "dataset://d/base", project_id="p1")
        ids = [d.id for d in datasets.files_of(connection, base.id) if d.name != "kept"]
        mark_purged(connection, [*ids, purged.id])
    warnings = settle(place)
    with place.records.read() as connection:
        version = datasets.get_version(connection, "dataset://d/v", project_id="p1")
        found = {d.name: d.id for d in datasets.files_of(connection, version.id)}
        assert set(found) == {"kept", "replaced"}
        assert found["replaced"] == own.id
        known = datasets.get_dataset(connection, "p1", "d")
        assert {v.name for v in datasets.list_versions(connection, known.id)} == {"v", "base"}
    assert warnings == [
        "dataset://d/v: 'own' cannot be in it, since the content was purged",
        "dataset://d/only: 'own' cannot be in it, since the content was purged",
        "dataset://d/v: 'gone' cannot be in it, since the content was purged",
    ]


def test_people_make_no_version_of_purged_files(place: Place) -> None:
    datum = place.datum("a")
    with place.records.write() as connection:
        mark_purged(connection, [datum.id])
    with place.records.write() as connection, pytest.raises(RefusedError, match="was purged"):
        datasets.create_version(
            connection, project_id="p1", uri="dataset://d/v", datum_ids=[datum.id], now=NOW
        )


def test_o08_metadata_that_was_said_again_counts_as_said_last(place: Place) -> None:
    datum = output(place, "a", dataset_versions=["dataset://d/first"])
    from valohai_dagster.records.tables import datums

    with place.records.write() as connection:
        new = {V: ["dataset://d/second"]}
        mine = datums.c.id == datum.id
        connection.execute(datums.update().where(mine).values(metadata=new))
    datum.metadata.clear()
    datum.metadata.update(new)
    assert again(place, datum) == []
    settle(place)
    assert names(place, "dataset://d/second") == ["a"]
    with pytest.raises(NotFoundError):
        dataset(place, "dataset://d/first")


def test_o13_one_version_per_execution_and_model_from_creating_to_pending(place: Place) -> None:
    note = {
        "model_uri": "model://net/",
        "model_version_tags": ["small"],
        "model_release_note": "Trained longer.",
    }
    output(place, "weights", model_versions=["model://net/"])
    output(place, "labels", model_versions=[note])
    with pytest.raises(RefusedError, match="execution e1 is still making"):
        model(place, "model://net/1")
    settle(place)
    found = model(place, "model://net/1")
    assert (found.status, found.tags, found.release_note) == (
        "pending",
        ["small"],
        "Trained longer.",
    )
    assert [change["status"] for change in found.history] == ["creating", "pending"]
    with place.records.read() as connection:
        files = models.files_of(connection, found.id)
    assert [datum.name for datum in files] == ["labels", "weights"]
    output(place, "weights", "e2", model_versions=["model://net/"])
    settle(place, "e2")
    assert model(place, "model://net/2").execution_id == "e2"


def test_t17_latest_is_the_newest_approved_version(place: Place) -> None:
    with place.records.write() as connection:
        for _ in range(3):
            models.create_version(
                connection, ModelWish(slug="net"), project_id="p1", datum_ids=[], now=NOW
            )
    with pytest.raises(NotFoundError, match="no version of model 'net' is approved"):
        model(place, "model://net/latest")
    with place.records.write() as connection:
        for number in (1, 2):
            version = models.get_version(connection, f"model://net/{number}", project_id="p1")
            models.decide(connection, version, approved=True, now=NOW)
    assert model(place, "model://net/latest").number == 2
    with place.records.write() as connection:
        version = models.get_version(connection, "model://net/2", project_id="p1")
        models.decide(connection, version, approved=False, now=NOW)
        models.describe(connection, version, release_note="bad on noise", tags=["x", "x"])
    assert model(place, "model://net/latest").number == 1
    second = model(place, "model://net/2")
    assert [c["status"] for c in second.history] == ["pending", "approved", "rejected"]
    assert (second.release_note, second.tags) == ("bad on noise", ["x"])


@pytest.mark.parametrize("by", ["sidecar", "dataset"])
def test_o23_a_sidecar_or_the_dataset_wants_the_version_packed(place: Place, by: str) -> None:
    if by == "dataset":
        with place.records.write() as connection:
            made = datasets.ensure_dataset(connection, project_id="p1", name="d", now=NOW)
            datasets.set_packaging(connection, made.id, True)
    output(place, "a", dataset_versions=[{"uri": "dataset://d/v", "packaging": by == "sidecar"}])
    with place.records.write() as connection:
        settled = settle_versions(connection, "e1", NOW)
        version = datasets.get_version(connection, "dataset://d/v", project_id="p1")
        known = packages.packaging_of(connection, version.id)
    assert settled.warnings == []
    assert known is not None
    assert known.state == packages.WANTED
    (told,) = [line for line in settled.made if "packed" in line]
    assert told == (
        "dataset://d/v will be packed in the background; it has 1 file, and packages are worth it from 1,000 on"
    )


def test_o23_versions_that_people_make_follow_the_switch_of_the_dataset(place: Place) -> None:
    datum = place.datum("a")
    with place.records.write() as connection:
        made = datasets.ensure_dataset(connection, project_id="p1", name="d", now=NOW)
        owner = {"project_id": "p1", "datum_ids": [datum.id], "now": NOW}
        for switch in (True, False):
            datasets.set_packaging(connection, made.id, switch)
            version = datasets.create_version(connection, uri=f"dataset://d/{switch}", **owner)
            assert (packages.packaging_of(connection, version.id) is not None) is switch


def test_o24_people_make_versions_with_properties_that_are_closed_at_once(place: Place) -> None:
    datum = place.datum("a")
    with place.records.write() as connection:
        made = datasets.create_version(
            connection,
            project_id="p1",
            uri="dataset://d/v",
            datum_ids=[datum.id],
            now=NOW,
            properties={"license": {"kind": "MIT"}},
        )
        datasets.set_properties(connection, made, {"rows": 5})
    found = dataset(place, "dataset://d/v")
    assert found.properties == {"license": {"kind": "MIT"}, "rows": 5}
    assert names(place, "dataset://d/v") == ["a"]
    with place.records.write() as connection:
        datasets.set_properties(connection, found, {"rows": None})
        with pytest.raises(RefusedError, match="versions never change"):
            datasets.create_version(
                connection, project_id="p1", uri="dataset://d/v", datum_ids=[], now=NOW
            )
    assert dataset(place, "dataset://d/v").properties == {"license": {"kind": "MIT"}}


def test_an_alias_and_a_version_never_have_one_name(place: Place) -> None:
    with place.records.write() as connection:
        one = datasets.create_version(
            connection, project_id="p1", uri="dataset://d/one", datum_ids=[], now=NOW
        )
        datasets.point_alias(connection, one, name="best", now=NOW)
        with pytest.raises(RefusedError, match="a version has that name"):
            datasets.point_alias(connection, one, name="one", now=NOW)
        with pytest.raises(RefusedError, match="is an alias"):
            datasets.create_version(
                connection, project_id="p1", uri="dataset://d/best", datum_ids=[], now=NOW
            )
    made = output(place, "a", dataset_versions=["dataset://d/best"])
    assert "is an alias of dataset 'd'" in made.properties["warnings"][0]
    assert settle(place) == []


def test_what_is_unknown_is_named_with_what_is_known(place: Place) -> None:
    with place.records.write() as connection:
        datasets.create_version(
            connection, project_id="p1", uri="dataset://d/v", datum_ids=[], now=NOW
        )
        models.ensure_model(connection, project_id="p1", slug="net", now=NOW)
    for uri, expected in (
        ("dataset://x/v", "no dataset 'x'; known are d"),
        ("dataset://d/w", "no version or alias 'w'; known are v"),
        ("dataset://d/", "no version or alias ''"),
    ):
        with pytest.raises(NotFoundError, match=expected):
            dataset(place, uri)
    for uri, expected in (
        ("model://x/1", "no model 'x'; known are net"),
        ("model://net/7", "no version '7'; known are none"),
        ("model://net/", "no version ''"),
    ):
        with pytest.raises(NotFoundError, match=expected):
            model(place, uri)
    with place.records.read() as connection, pytest.raises(NotFoundError, match="name the project"):
        datasets.get_version(connection, "dataset://d/v", project_id=None)


def test_where_a_datum_is_used_is_known(place: Place) -> None:
    datum = output(place, "a", dataset_versions=["dataset://d/v"], model_versions=["model://m/"])
    settle(place)
    with place.records.read() as connection:
        assert [
            v.uri for v in datasets.versions_holding(connection, [datum.id, "none"])[datum.id]
        ] == ["dataset://d/v"]
        assert [v.uri for v in models.versions_holding(connection, [datum.id])[datum.id]] == [
            "model://m/1"
        ]
