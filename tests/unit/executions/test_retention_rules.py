"""What retention lets go, and why something stays."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from valohai_dagster.executions.retention_rules import (
    Output,
    Owner,
    why_output_stays,
    why_owner_keeps,
)
from valohai_dagster.settings_retention import ProjectRetention, RetentionSettings

NOW = datetime(2026, 6, 1, tzinfo=timezone.utc)
POLICY = RetentionSettings(outputs_days=30, keep_tags=["golden"])


def owner(days: float | None, ident: str = "e1", **values: Any) -> Owner:
    ended = NOW - timedelta(days=days) if days is not None else None
    return Owner(**{"id": ident, "project": "digits", "ended_at": ended, **values})


def test_nothing_goes_by_default() -> None:
    off = RetentionSettings()
    assert all(off.shortest(kind) is None for kind in ("logs", "outputs", "metadata", "code"))
    assert why_output_stays(off, Output(owner=owner(9999)), NOW) == "not old enough"


def test_what_is_old_goes_and_what_is_not_stays() -> None:
    assert why_output_stays(POLICY, Output(owner=owner(31)), NOW) is None
    assert why_output_stays(POLICY, Output(owner=owner(29)), NOW) == "not old enough"
    assert why_output_stays(POLICY, Output(owner=owner(None)), NOW) == "not old enough"


@pytest.mark.parametrize(
    ("values", "setting", "words"),
    [
        ({"aliased": True}, "keep_aliased", "an alias names it"),
        ({"tagged": True}, "keep_tagged", "it has a tag"),
        ({"in_dataset": True}, "keep_in_datasets", "it is in a dataset version"),
        ({"in_model": True}, "keep_in_models", "it is in a model version"),
        ({"readers": [owner(3, "r")]}, "keep_used", "a kept execution has read it"),
        (
            {"readers": [owner(99, "r")], "named_readers": frozenset({"r"})},
            "keep_used",
            "a kept execution has read it",
        ),
        (
            {"readers": [owner(99, "r", tags=["golden"])]},
            "keep_used",
            "a kept execution has read it",
        ),
    ],
)
def test_each_exception_can_be_switched_off(
    values: dict[str, Any], setting: str, words: str
) -> None:
    output = Output(owner=owner(99), **values)
    assert why_output_stays(POLICY, output, NOW) == words
    off = POLICY.model_copy(update={setting: False})
    assert why_output_stays(off, output, NOW) is None


def test_what_a_running_execution_reads_always_stays() -> None:
    off = POLICY.model_copy(update={"keep_used": False})
    output = Output(owner=owner(99), readers=[owner(None, "r")])
    assert why_output_stays(off, output, NOW) == "an execution that has not ended reads it"


def test_readers_that_are_not_kept_keep_nothing() -> None:
    assert why_output_stays(POLICY, Output(owner=owner(99), readers=[owner(50, "r")]), NOW) is None


def test_tags_of_executions_keep_all_of_theirs() -> None:
    policy = RetentionSettings(logs_days=1, keep_tags=["golden"])
    assert why_owner_keeps(policy, "logs", owner(9, tags=["golden"]), NOW) == (
        "its execution has the tag golden"
    )
    assert why_owner_keeps(policy, "logs", owner(9, tags=["other"]), NOW) is None


def test_a_project_may_have_other_days() -> None:
    own = {"digits": ProjectRetention(outputs_days=365), "scrap": ProjectRetention(outputs_days=1)}
    policy = RetentionSettings(
        outputs_days=30, projects={**own, "safe": ProjectRetention(outputs_days=0)}
    )
    assert why_owner_keeps(policy, "outputs", owner(99), NOW) == "not old enough"
    assert why_owner_keeps(policy, "outputs", owner(2, project="scrap"), NOW) is None
    assert why_owner_keeps(policy, "outputs", owner(9999, project="safe"), NOW) == "not old enough"
    assert why_owner_keeps(policy, "outputs", owner(31, project="other"), NOW) is None
    assert policy.shortest("outputs") == 1
