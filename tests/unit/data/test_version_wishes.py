"""What outputs may ask for in `valohai.dataset-versions` and `valohai.model-versions`."""

from __future__ import annotations

from typing import Any

import pytest

from valohai_dagster.data.version_wishes import (
    DatasetWish,
    ModelWish,
    files_of_version,
    merge_dataset_wishes,
    merge_model_wishes,
    wishes_of,
)


def datasets(value: Any) -> list[DatasetWish]:
    found = wishes_of({"valohai.dataset-versions": value})
    assert found.problems == []
    return found.datasets


def problem(key: str, value: Any) -> str:
    found = wishes_of({key: value})
    assert found.datasets == []
    assert found.models == []
    (text,) = found.problems
    return text


def test_o10_a_uri_is_a_whole_wish() -> None:
    expected = [DatasetWish(dataset="faces", version="v1")]
    assert datasets(["dataset://faces/v1"]) == expected
    assert datasets("dataset://faces/v1") == expected
    assert datasets({"uri": "dataset://faces/v1"}) == expected


def test_o10_an_object_says_all_that_the_contract_knows() -> None:
    (wish,) = datasets(
        [
            {
                "uri": "dataset://faces/v2",
                "from": "dataset://faces/v1",
                "start_fresh": False,
                "exclude": ["a.jpg"],
                "targeting_aliases": ["best"],
                "packaging": True,
                "valohai.tags": ["dev"],
            }
        ]
    )
    assert wish == DatasetWish(
        dataset="faces",
        version="v2",
        base="dataset://faces/v1",
        exclude=("a.jpg",),
        aliases=("best",),
        tags=("dev",),
        packaging=True,
    )
    assert wish.carries_over == "dataset://faces/v1"
    (fresh,) = datasets([{"uri": "dataset://f/v", "from": "v1", "start_fresh": True}])
    assert fresh.carries_over is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, "must be a list"),
        ([5], "expected a URI"),
        ([{"from": "x"}], "expected a URI"),
        (["faces/v1"], "not of the form dataset://DATASET/VERSION"),
        (["dataset://faces"], "is no version name"),
        (["dataset://faces/"], "is no version name"),
        (["dataset:///v"], "is no dataset name"),
        (["dataset://faces/a/b"], "must not contain /"),
        (["dataset://faces/latest"], "always means the newest"),
        (["dataset://faces/ v"], "no outer spaces"),
        (["dataset://faces/" + "v" * 256], "at most 255"),
        ([{"uri": "dataset://f/v", "exclude": [1]}], "`exclude` must be a list of strings"),
        ([{"uri": "dataset://f/v", "from": 3}], "`from` must be a text"),
        ([{"uri": "dataset://f/v", "start_fresh": "no"}], "must be true or false"),
        ([{"uri": "dataset://f/v", "targeting_aliases": ["a/b"]}], "is no dataset alias"),
    ],
)
def test_o10_what_is_not_understood_is_named(value: Any, expected: str) -> None:
    assert expected in problem("valohai.dataset-versions", value)


def test_o10_an_unknown_key_is_named_and_the_rest_counts() -> None:
    found = wishes_of({"valohai.dataset-versions": [{"uri": "dataset://f/v", "fresh": True}]})
    assert [wish.uri for wish in found.datasets] == ["dataset://f/v"]
    assert found.problems == ["dataset://f/v: fresh has no meaning here and is ignored"]


def test_one_wrong_entry_does_not_lose_the_others() -> None:
    found = wishes_of({"valohai.dataset-versions": ["nope", "dataset://f/v"]})
    assert len(found.datasets) == len(found.problems) == 1


def test_o13_models_are_asked_for_by_uri_or_object() -> None:
    found = wishes_of(
        {
            "valohai.model-versions": [
                "model://net/",
                "model://other",
                {
                    "model_uri": "model://net/",
                    "model_version_tags": ["small"],
                    "model_release_note": "Trained longer.",
                },
            ]
        }
    )
    assert found.problems == []
    assert [wish.slug for wish in found.models] == ["net", "other", "net"]
    merged = merge_model_wishes(wish for wish in found.models if wish.slug == "net")
    assert merged == ModelWish(slug="net", tags=("small",), release_note="Trained longer.")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["model://net/3"], "numbered by the registry"),
        (["net"], "not of the form model://SLUG/"),
        ([{"model_uri": "model://net/", "model_release_note": 3}], "must be a text"),
        ([[]], "expected a URI"),
        ([{}], "expected a URI"),
    ],
)
def test_o13_what_is_not_understood_is_named(value: Any, expected: str) -> None:
    assert expected in problem("valohai.model-versions", value)


def test_o11_wishes_of_all_files_become_one() -> None:
    merged = merge_dataset_wishes(
        [
            DatasetWish(dataset="d", version="v", exclude=("a",), tags=("x",)),
            DatasetWish(dataset="d", version="v", base="v0", exclude=("b", "a"), aliases=("best",)),
            DatasetWish(dataset="d", version="v", base="v9", start_fresh=True, tags=("x", "y")),
        ]
    )
    assert merged == DatasetWish(
        dataset="d",
        version="v",
        base="v0",
        start_fresh=True,
        exclude=("a", "b"),
        aliases=("best",),
        tags=("x", "y"),
    )


def test_o10_a_new_file_replaces_a_carried_one_and_the_last_of_a_name_counts() -> None:
    carried = [("1", "a"), ("2", "b"), ("3", "sub/c")]
    assert files_of_version(carried, [], []) == ["1", "2", "3"]
    assert files_of_version(carried, [("4", "b"), ("5", "d"), ("6", "d")], ["sub/c"]) == [
        "1",
        "4",
        "6",
    ]
    assert files_of_version([], [("1", "a")], ["a"]) == ["1"], "only carried files are excluded"
