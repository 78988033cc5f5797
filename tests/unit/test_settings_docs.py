"""The settings reference page is what the models say."""

from __future__ import annotations

from pathlib import Path

from valohai_dagster import settings_docs
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import GROUP_KINDS
from valohai_dagster.settings_stores import STORE_KINDS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_in_the_repository_is_the_generated_one() -> None:
    assert PAGE.read_text() == settings_docs.render(), (
        "run `python -m valohai_dagster.settings_docs`"
    )


def test_every_setting_is_described() -> None:
    for model in (Settings, *GROUP_KINDS.values(), *STORE_KINDS.values()):
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name} has no description"
            assert info.exclude or f"`{name}`" in settings_docs.render()
