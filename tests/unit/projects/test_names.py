"""Legal Dagster names for names that people chose."""

from __future__ import annotations

from dagster._core.definitions.utils import DISALLOWED_NAMES
from hypothesis import given
from hypothesis import strategies as st

from valohai_dagster.projects.names import is_legal, legal_name, legal_names


def test_a_legal_name_stays_and_others_become_readable() -> None:
    assert legal_name("train_model") == "train_model"
    assert legal_name("Train the model (v2)!") == "Train_the_model_v2"
    assert legal_name("entraîne-modèle") == "entraine_modele"


def test_reserved_words_of_dagster_are_not_legal() -> None:
    for word in DISALLOWED_NAMES:
        assert legal_name(word) != word
        assert is_legal(legal_name(word))


def test_names_without_any_legal_sign_are_told_apart() -> None:
    names = legal_names(["訓練", "評価", "!!!"])
    assert len(set(names.values())) == 3
    assert all(is_legal(name) for name in names.values())


def test_adding_a_step_renames_no_other() -> None:
    before = legal_names(["a b", "a-b", "c"])
    after = legal_names(["zzz", "a-b", "c", "a b", "a.b"])
    assert {name: after[name] for name in before} == before
    assert legal_names(["a_b", "a b"])["a_b"] == "a_b"


@given(st.lists(st.text(), max_size=8))
def test_any_names_become_legal_and_different(names: list[str]) -> None:
    mapping = legal_names(names)
    assert set(mapping) == set(names)
    assert len(set(mapping.values())) == len(mapping)
    assert all(is_legal(name) for name in mapping.values())
