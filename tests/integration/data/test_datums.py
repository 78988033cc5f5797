"""Datums and their aliases, tags and sidecar effects."""

from __future__ import annotations

import threading
import uuid
from datetime import timedelta

import pytest
import sqlalchemy as sa

from tests.integration.data.conftest import NOW, Place
from tests.support.postgres_server import wait_for_blocked
from valohai_dagster.data import aliases, datums
from valohai_dagster.data.sidecar_effects import apply_sidecar_effects
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records import tables

pytestmark = pytest.mark.parametrize("place", ["sqlite", "postgres"], indirect=True)


def effects(place: Place, datum_id: str, **metadata: object) -> list[str]:
    named = {f"valohai.{key.replace('_', '-')}": value for key, value in metadata.items()}
    with place.records.write() as connection:
        return apply_sidecar_effects(
            connection,
            datum_id=datum_id,
            project_id="p1",
            execution_id="e1",
            metadata=named,
            now=NOW,
        )


def found(place: Place, reference: str, project: str | None = "p1") -> datums.Datum:
    with place.records.read() as connection:
        return datums.get_datum(connection, reference, project_id=project)


def test_what_is_recorded_comes_back(place: Place) -> None:
    datum = place.datum("a/ä\n b", tags=["x"], metadata={"k": [1]}, live=True)
    assert found(place, datum.uri) == datum
    assert found(place, datum.id.upper()) == datum


def test_many_are_found_at_once_and_unknown_ones_left_out(place: Place) -> None:
    datum = place.datum("a")
    others = [str(uuid.uuid4()) for _ in range(datums.CHUNK)]
    with place.records.read() as conn:
        assert datums.find_datums(conn, [*others, datum.id.upper()]) == {datum.id: datum}


def test_an_alias_without_a_project_says_what_is_missing(place: Place) -> None:
    with pytest.raises(NotFoundError, match="name the project too"):
        found(place, "best", project=None)


def test_listing_is_newest_first_and_filters(place: Place) -> None:
    old = place.datum("runs/1/model_a.pkl", tags=["m"], ctime=NOW - timedelta(days=1))
    new = place.datum("runs/2/model_a.pkl", tags=["m", "good"], execution_id="e")
    other = place.datum("modelXa.pkl", project_id="p2")
    gone = place.datum("gone", purged=True)
    with place.records.read() as connection:

        def ids(**filters: object) -> set[str]:
            return {d.id for d in datums.list_datums(connection, **filters)}  # type: ignore[arg-type]

        everything = datums.list_datums(connection)
        assert everything[-1] == old
        assert gone.id in ids(purged=True) - ids()
        assert ids(name="*model_a*") == {old.id, new.id}, "an underscore is no wildcard"
        assert ids(project_id="p2") == {other.id}
        assert ids(tags=["good", "m"]) == {new.id}
        assert ids(execution_ids=["e"]) == {new.id}
        assert len(datums.list_datums(connection, limit=2)) == 2


def test_o20_purge_deletes_the_content_and_keeps_the_record(place: Place) -> None:
    datum = place.datum("a")
    with place.records.write() as connection:
        datums.mark_purged(connection, [datum.id])
        assert not datums.is_shared(connection, datum)
    assert found(place, datum.id).purged_at is None
    assert datums.delete_content(place.stores, datum)
    assert place.stores.default.stat(datum.key) is None
    with place.records.write() as connection:
        datums.end_purge(connection, [datum.id], NOW)
    kept = found(place, datum.id)
    assert kept.purged
    assert kept.purged_at == NOW
    with pytest.raises(RefusedError, match=r"\(a\): the content was purged"):
        datums.require_content(kept)


def test_t15_moving_an_alias_keeps_its_history(place: Place) -> None:
    first, second = place.datum("a"), place.datum("b")
    with place.records.write() as connection:
        for datum, hours in ((first, 0), (second, 1), (second, 2), (first, 3)):
            aliases.set_alias(
                connection,
                project_id="p1",
                name="best",
                datum_id=datum.id,
                now=NOW + timedelta(hours=hours),
            )
    assert found(place, "datum://best") == first
    with place.records.read() as connection:
        history = aliases.alias_history(connection, "p1", "best")
        assert aliases.alias_history(connection, "p1", "none") == []
        assert datums.aliases_of(connection, [first.id, second.id]) == {first.id: ["best"]}
    assert [entry["datum_id"] for entry in history] == [first.id, second.id, first.id]
    assert history[1]["time"] == "2026-05-04T13:00:00+00:00"


def test_t15_writers_that_meet_lose_none_of_their_moves(place: Place) -> None:
    """Both begin while the alias is not there: the second one waits for the first, and adds its move."""
    first, second = place.datum("a"), place.datum("b")
    wish = {"project_id": "p1", "name": "best", "now": NOW}
    wrote, begun = threading.Event(), threading.Event()

    def other() -> None:
        assert wrote.wait(10)
        begun.set()
        with place.records.write() as connection:
            aliases.set_alias(connection, datum_id=second.id, **wish)

    thread = threading.Thread(target=other)
    thread.start()
    with place.records.write() as connection:
        aliases.set_alias(connection, datum_id=first.id, **wish)
        wrote.set()
        assert begun.wait(10)
        if place.records.engine.dialect.name == "postgresql":
            wait_for_blocked(place.records.engine)
    thread.join(10)
    with place.records.read() as connection:
        history = aliases.alias_history(connection, "p1", "best")
    assert [move["datum_id"] for move in history] == [first.id, second.id]


def test_content_is_found_by_its_place_however_long_the_key_is(place: Place) -> None:
    key = "data/" + "".join(f"{number:x}/" for number in range(1000))[:4000]
    datum = place.datum("a", key=key[:4096])
    with place.records.write() as connection:
        assert not datums.is_shared(connection, datum)
        query = "SELECT id FROM vh_datums WHERE store = 'local' AND key = 'data/x' AND NOT purged"
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
            plan = connection.execute(sa.text(f"EXPLAIN {query}")).scalars().all()
        else:
            plan = [row[3] for row in connection.execute(sa.text(f"EXPLAIN QUERY PLAN {query}"))]
    assert "ix_vh_datums_key" in " ".join(plan)


def test_o09_tags_and_alias_of_a_sidecar_take_effect(place: Place) -> None:
    datum = place.datum("a", tags=["x"])
    assert effects(place, datum.id, tags=["x", "y"], alias="best", color="red") == []
    assert found(place, "best").tags == ["x", "y"]


def test_o09_versions_that_are_not_understood_are_named_and_ignored(place: Place) -> None:
    datum = place.datum("a")
    warnings = effects(place, datum.id, dataset_versions=["nope"], model_versions=["model://m/1"])
    assert len(warnings) == 2
    assert all(datum.uri in text and "ignored" in text for text in warnings)


@pytest.mark.parametrize("tags", ["one", [1], {"a": 1}, None])
def test_o09_tags_that_are_no_list_of_strings_are_named_and_ignored(
    place: Place, tags: object
) -> None:
    datum = place.datum("a")
    (warning,) = effects(place, datum.id, tags=tags)
    assert "must be a list of strings" in warning
    assert found(place, datum.id).tags == []


@pytest.mark.parametrize(
    "alias",
    [["a"], "", " ", None, 5, "x" * 256, "a\nb", " a", "00000000-0000-4000-8000-000000000000"],
)
def test_o09_a_bad_alias_is_named_and_ignored(place: Place, alias: object) -> None:
    datum = place.datum("a")
    (warning,) = effects(place, datum.id, alias=alias)
    assert "is no datum alias" in warning
    with place.records.read() as connection:
        assert datums.aliases_of(connection, [datum.id]) == {}


def test_what_was_adopted_is_deleted_only_when_asked(place: Place) -> None:
    datum = place.datum("a", adopted=True)
    assert not datums.delete_content(place.stores, datum)
    assert place.stores.default.stat(datum.key) is not None
    assert datums.delete_content(place.stores, datum, adopted_too=True)
    assert place.stores.default.stat(datum.key) is None


def test_o25_tags_come_and_go(place: Place) -> None:
    datum = place.datum("a", tags=["x"])
    with place.records.write() as connection:
        datums.add_tags(connection, datum.id, ["y", "x"])
        datums.remove_tags(connection, datum.id, ["x", "none"])
    assert found(place, datum.id).tags == ["y"]


def test_content_that_another_datum_has_too_is_known(place: Place) -> None:
    first = place.datum("a")
    second = place.datum("b")
    with place.records.write() as connection:
        both = tables.datums.c.id == second.id
        connection.execute(tables.datums.update().where(both).values(key=first.key))
        assert datums.is_shared(connection, first)
        datums.mark_purged(connection, [second.id])
        assert not datums.is_shared(connection, first)
