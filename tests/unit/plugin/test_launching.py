"""From a tag and a run's config to a spec, without user code."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.dagster_face import TWO_STEPS, project_of
from valohai_dagster.errors import BrokerUnavailable, SpecError
from valohai_dagster.executions.spec import LaunchIds
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.plugin.launching import config_of, failure_of, spec_of
from valohai_dagster.plugin.partitions import RunPartitions
from valohai_dagster.plugin.step_tag import StepTag, read_step_tag, step_tag
from valohai_dagster.projects.upstream import UpstreamFile, UpstreamResult

COMMIT = CommitRef(
    identifier="a" * 40, archive_store="local", archive_key="k", archive_sha256="0" * 64
)
PARTITIONED = """
- step:
    name: train
    image: python:3.11
    command: python train.py {parameters}
    parameters:
      - {name: day, type: string}
      - {name: days, type: string, multiple: repeat, optional: true}
"""


def tag_of(text: str = TWO_STEPS, **options: Any) -> StepTag:
    project = project_of(text)
    tag = step_tag(project, project.step("train"), code_version="v", **options)
    return read_step_tag(tag.to_text())


def spec(tag: StepTag, run_config: dict[str, Any] | None = None, **options: Any) -> ExecutionSpec:
    config = config_of(tag, run_config or {}, ["digits__train"])
    return spec_of(
        tag,
        config=config,
        commit=COMMIT,
        ids=LaunchIds(execution_id="e1"),
        **{"upstream": {}, **options},
    )


def config(**values: Any) -> dict[str, Any]:
    return {"ops": {"digits__train": {"config": values}}}


def test_launch_values_stand_above_upstream_and_defaults() -> None:
    upstream = {"Prepare data": UpstreamResult(outputs=(UpstreamFile(name="a.csv", uri="u"),))}
    made = spec(tag_of(), config(parameters={"learning-rate": 0.5}), upstream=upstream)
    assert made.parameters == {"learning-rate": 0.5}
    assert made.inputs[0].uris == ["u"]
    assert spec(tag_of(), upstream=upstream).parameters == {"learning-rate": 0.1}


def test_a_jobs_own_config_counts_where_the_run_says_nothing() -> None:
    tag = tag_of()
    resolved = config(parameters={"learning-rate": 0.7})
    assert config_of(tag, {}, ["digits__train"], resolved=resolved).parameters == {
        "learning-rate": 0.7
    }


def test_what_upstream_is_missing_is_named() -> None:
    with pytest.raises(SpecError, match="Prepare data"):
        spec(tag_of())


def test_warnings_of_the_archive_are_told_once() -> None:
    given = {"Prepare data": UpstreamResult(outputs=(UpstreamFile(name="a.csv", uri="u"),))}
    made = spec(tag_of(), upstream=given, archive_warnings=["large", "large"])
    assert made.warnings.count("large") == 1


def test_a_partition_reaches_parameter_variables_tags_and_record() -> None:
    tag = tag_of(PARTITIONED, partition_parameter="day")
    made = spec(tag, partitions=RunPartitions(keys=("2026-01-01",)))
    assert made.parameters["day"] == "2026-01-01"
    assert made.commands == ["python train.py --day=2026-01-01"]
    assert made.environment_variables == {
        "VH_PARTITION_KEY": "2026-01-01",
        "VH_PARTITION_KEYS": '["2026-01-01"]',
    }
    assert made.partition_key == "2026-01-01"
    assert made.tags == ["partition:2026-01-01"]


def test_a_launch_value_beats_the_partition() -> None:
    tag = tag_of(PARTITIONED, partition_parameter="day")
    made = spec(
        tag,
        config(parameters={"day": "mine"}, environment_variables={"VH_PARTITION_KEY": "also"}),
        partitions=RunPartitions(keys=("2026-01-01",)),
    )
    assert made.parameters["day"] == "mine"
    assert made.environment_variables["VH_PARTITION_KEY"] == "also"


def test_a_range_is_one_label_or_several_values() -> None:
    days = RunPartitions(keys=("2026-01-01", "2026-01-02", "2026-01-03"))
    one = spec(tag_of(PARTITIONED, partition_parameter="day"), partitions=days)
    assert one.parameters["day"] == one.partition_key == "2026-01-01...2026-01-03"
    several = spec(
        tag_of(PARTITIONED, partition_parameter="days"),
        config(parameters={"day": "x"}),
        partitions=days,
    )
    assert several.parameters["days"] == list(days.keys)
    assert several.environment_variables["VH_PARTITION_KEYS"] == (
        '["2026-01-01", "2026-01-02", "2026-01-03"]'
    )


def test_dimensions_become_variables_of_their_own() -> None:
    tags = {
        "dagster/partition": "2026-01-01|north",
        "dagster/partition/day": "2026-01-01",
        "dagster/partition/sales region": "north",
    }
    made = spec(
        tag_of(PARTITIONED, partition_parameter="day"), partitions=RunPartitions.of_tags(tags)
    )
    assert made.environment_variables["VH_PARTITION_KEY_DAY"] == "2026-01-01"
    assert made.environment_variables["VH_PARTITION_KEY_SALES_REGION"] == "north"
    assert made.parameters["day"] == "2026-01-01|north"


def test_ten_thousand_keys_do_not_break_the_command() -> None:
    keys = RunPartitions(keys=tuple(f"2026-01-01-{n:05}" for n in range(10_000)))
    assert "VH_PARTITION_KEYS" not in keys.variables()
    assert keys.variables()["VH_PARTITION_KEY"] == "2026-01-01-00000...2026-01-01-09999"


def test_a_run_without_partition_has_none() -> None:
    assert RunPartitions.of_tags({"a": "b"}).label is None


def test_only_what_may_go_away_by_itself_is_retried() -> None:
    assert failure_of(BrokerUnavailable("away")).allow_retries
    wrong = failure_of(SpecError("step cannot run:", ["parameter `x` is bad"]))
    assert not wrong.allow_retries
    assert "Next: correct this" in wrong.description
    assert "parameter `x` is bad" in str(wrong.metadata["problems"].value)


def test_o15_the_projects_store_counts_where_the_launch_names_none() -> None:
    tag = tag_of(PARTITIONED, upload_store="models")
    given = {"day": "x"}
    assert spec(tag, config(parameters=given)).upload_store == "models"
    launched = spec(tag, config(parameters=given, upload_store="archive"))
    assert launched.upload_store == "archive"
