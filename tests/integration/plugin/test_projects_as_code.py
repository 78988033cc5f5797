"""Projects from real directories: loading, broken ones, the component, and the sensor for new commits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
from dagster import AssetKey, DagsterInstance

from tests.support.dagster_face import FakeBackend
from valohai_dagster import (
    ProjectError,
    ValohaiProjectComponent,
    load_project,
    load_valohai_project,
    project_assets,
)
from valohai_dagster.errors import RefusedError, ServiceUnavailable
from valohai_dagster.plugin.git_sensor import build_git_sensor
from valohai_dagster.plugin.reload import reload_code_location
from valohai_dagster.plugin.step_tag import STEP_TAG, read_step_tag

YAML = """
- step:
    name: train
    image: python:3.11
    command: python train.py
    resources: {cpu: {min: 1}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "digits"
    directory.mkdir()
    (directory / "valohai.yaml").write_text(YAML)
    git(directory, "init", "-q", "-b", "main")
    commit(directory)
    return directory


def git(directory: Path, *args: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", "-C", str(directory), *identity, *args], check=True, capture_output=True)


def commit(directory: Path) -> None:
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "x")


def specs(defs: dg.Definitions) -> dict[AssetKey, dg.AssetSpec]:
    return {spec.key: spec for spec in defs.resolve_all_asset_specs()}


MANY = """
- step:
    name: train
    image: python:3.11
    command: python train.py
    resources: {cpu: {min: 1}}
    outputs:
      - {name: model, description: the weights}
- step: {name: train more, image: i, command: c}
- task: {name: sweep, step: train, parameters: [{name: p, style: multiple, rules: {items: [1]}}]}
- endpoint: {name: predict, image: i, port: 8000, server-command: serve}
- pipeline:
    name: all
    nodes:
      - {name: one, type: execution, step: train, on-error: continue}
      - {name: two, type: execution, step: train more}
    edges: []
"""


def test_what_has_no_effect_is_in_the_description_and_in_the_log_of_the_steps_it_concerns(
    project: Path, tmp_path: Path
) -> None:
    (project / "valohai.yaml").write_text(MANY)
    commit(project)
    backend = FakeBackend()
    loaded = load_project(project, cache_dir=tmp_path / "cache")
    assets = project_assets(loaded, open_backend=lambda: backend)
    found = {
        key: spec.description or "" for asset in assets for key, spec in asset.specs_by_key.items()
    }
    with dg.instance_for_test() as instance:
        assert dg.materialize(assets, instance=instance).success
    logs = {spec.step: "\n".join(spec.warnings) for spec in backend.submitted}
    for step, asset in (("train", "train"), ("train more", "train_more")):
        for text in (found[AssetKey(["digits", asset])], logs[step]):
            own = step == "train"
            assert "endpoint `predict` has no effect" in text
            assert ("`resources` has no effect" in text) == own
            assert ("task `sweep` of step `train` has no effect" in text) == own
            assert ("`on-error: continue` has no effect" in text) == own
    assert "- `model`: the weights" in found[AssetKey(["digits", "train"])]


def test_a_projects_own_notes_are_on_every_asset_and_in_every_log(
    project: Path, tmp_path: Path
) -> None:
    (project / "valohai.yaml").write_text("- definitions: {x: 1}\n" + MANY)
    loaded = load_project(project, cache_dir=tmp_path / "cache")
    for step in loaded.steps.values():
        assert any("`definitions`" in note for note in step.notes)


def test_a_broken_project_counts_what_it_lists(project: Path, tmp_path: Path) -> None:
    (project / "valohai.yaml").write_text(
        "- step:\n    name: x\n    image: y\n    image: z\n- stp: {}\n"
    )
    with pytest.raises(ProjectError, match="has 1 error and 2 warnings:") as caught:
        load_valohai_project(project, cache_dir=tmp_path / "cache", strict=True)
    assert len(caught.value.problems) == 3
    assert sum(problem.startswith("warning: line") for problem in caught.value.problems) == 2


def test_a_broken_project_tells_line_and_hint_and_others_still_load(
    project: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "valohai.yaml").write_text("- step:\n    name: x\n    image: y\n")
    cache = tmp_path / "cache"
    defs = dg.Definitions.merge(
        load_valohai_project(project, cache_dir=cache),
        load_valohai_project(broken, cache_dir=cache),
    )
    found = specs(defs)
    assert AssetKey(["digits", "train"]) in found
    text = found[AssetKey(["broken", "broken_project"])].description or ""
    assert "command" in text
    assert "line" in text
    with pytest.raises(ProjectError):
        load_valohai_project(broken, cache_dir=cache, strict=True)


def test_a_directory_without_yaml_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"has no valohai\.yaml"):
        load_valohai_project(tmp_path, cache_dir=tmp_path / "cache", strict=True)


def test_running_a_broken_project_fails_with_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "valohai.yaml").write_text("- step: {}\n")
    defs = load_valohai_project(tmp_path, name="broken", cache_dir=tmp_path / "cache")
    assets: Any = list(defs.assets or ())
    with dg.instance_for_test() as instance, pytest.raises(dg.Failure, match="broken"):
        dg.materialize(assets, instance=instance)


def test_the_component_takes_its_attributes_from_yaml(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALOHAI_STATE", str(tmp_path / "state"))
    from dagster.components.testing import create_defs_folder_sandbox

    with create_defs_folder_sandbox() as sandbox:
        path = sandbox.scaffold_component(
            component_cls=ValohaiProjectComponent,
            defs_yaml_contents={
                "type": "valohai_dagster.plugin.ValohaiProjectComponent",
                "attributes": {
                    "source": str(project),
                    "group_name": "ml",
                    "owners": ["team:vision"],
                    "git_sensor": True,
                },
            },
        )
        with sandbox.load_component_and_build_defs(defs_path=path) as (component, defs):
            assert isinstance(component, ValohaiProjectComponent)
            found = specs(defs)[AssetKey(["digits", "train"])]
            assert (found.group_name, list(found.owners)) == ("ml", ["team:vision"])
            assert [sensor.name for sensor in defs.sensors or ()] == ["digits_new_commits"]


def test_the_component_declares_partitions_checks_retries_and_pools(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALOHAI_STATE", str(tmp_path / "state"))
    from dagster.components.testing import create_defs_folder_sandbox

    check = {"name": "good", "condition": "accuracy > 0.9", "blocking": True}
    train = {
        "partitions": {"type": "daily", "start_date": "2026-01-01"},
        "partitions_per_execution": "all",
        "checks": [check],
        "max_retries": 2,
        "retry_delay_seconds": 5,
        "retry_backoff": "exponential",
    }
    attributes = {
        "source": str(project),
        "pool": "gpu",
        "upload_store": "models",
        "steps": {"train": train},
    }
    with create_defs_folder_sandbox() as sandbox:
        path = sandbox.scaffold_component(
            component_cls=ValohaiProjectComponent,
            defs_yaml_contents={
                "type": "valohai_dagster.plugin.ValohaiProjectComponent",
                "attributes": attributes,
            },
        )
        with sandbox.load_component_and_build_defs(defs_path=path) as (_, defs):
            asset = defs.resolve_assets_def(AssetKey(["digits", "train"]))
    assert asset.partitions_def == dg.DailyPartitionsDefinition(start_date="2026-01-01")
    assert asset.backfill_policy == dg.BackfillPolicy.single_run()
    assert [(spec.name, spec.blocking) for spec in asset.check_specs] == [("good", True)]
    policy = dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL)
    op: Any = asset.op
    assert (op.retry_policy, op.pool) == (policy, "gpu")
    assert read_step_tag(op.tags[STEP_TAG]).upload_store == "models"


def test_o15_a_project_names_the_store_of_its_outputs(project: Path, tmp_path: Path) -> None:
    stores = {"*": "models", "train": "archive"}
    for given, expected in (("models", "models"), (stores, "archive"), (None, None)):
        defs = load_valohai_project(
            project, cache_dir=tmp_path / "cache", name="digits", upload_store=given
        )
        op: Any = defs.resolve_assets_def(AssetKey(["digits", "train"])).op
        assert read_step_tag(op.tags[STEP_TAG]).upload_store == expected


def test_options_that_do_not_fit_the_project_become_one_asset_that_tells(
    project: Path, tmp_path: Path
) -> None:
    defs = load_valohai_project(
        project, cache_dir=tmp_path / "cache", pool={"trian": "gpu"}, name="digits"
    )
    (found,) = specs(defs).values()
    assert "did you mean `train`?" in (found.description or "")


def tick(
    sensor: dg.SensorDefinition, cursor: str | None, instance: DagsterInstance
) -> tuple[str | None, str]:
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    data = sensor.evaluate_tick(context)
    return data.cursor, data.skip_message or ""


def test_the_sensor_reloads_once_per_commit(project: Path, tmp_path: Path) -> None:
    reloaded: list[str] = []
    sensor = build_git_sensor(project, cache_dir=tmp_path / "cache", reload=reloaded.append)
    with dg.instance_for_test() as instance:
        cursor, message = tick(sensor, None, instance)
        assert "watching" in message
        assert tick(sensor, cursor, instance)[0] == cursor
        (project / "train.py").write_text("print(1)")
        commit(project)
        moved, message = tick(sensor, cursor, instance)
        assert "reloaded" in message
        assert moved != cursor
        assert tick(sensor, moved, instance)[0] == moved
    assert reloaded == ["digits"]


def test_the_sensor_keeps_the_last_good_commit_when_the_newest_is_broken(
    project: Path, tmp_path: Path
) -> None:
    reloaded: list[str] = []
    sensor = build_git_sensor(project, cache_dir=tmp_path / "cache", reload=reloaded.append)
    with dg.instance_for_test() as instance:
        cursor, _ = tick(sensor, None, instance)
        (project / "valohai.yaml").write_text("- step: {}\n")
        commit(project)
        after, message = tick(sensor, cursor, instance)
    assert after == cursor
    assert "cannot be used" in message
    assert reloaded == []


def test_a_commit_that_came_between_loading_and_the_first_tick_is_reloaded(
    project: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    url = f"file://{project}"
    load_valohai_project(url, name="digits", cache_dir=cache)
    (project / "train.py").write_text("print(1)")
    commit(project)
    reloaded: list[str] = []
    sensor = build_git_sensor(url, name="digits", cache_dir=cache, reload=reloaded.append)
    with dg.instance_for_test() as instance:
        cursor, message = tick(sensor, None, instance)
        assert "reloaded" in message
        assert tick(sensor, cursor, instance)[0] == cursor
    assert reloaded == ["digits"]


def test_the_first_tick_reloads_nothing_when_the_loaded_commit_is_the_newest(
    project: Path, tmp_path: Path
) -> None:
    load_valohai_project(project, cache_dir=tmp_path / "cache")
    reloaded: list[str] = []
    sensor = build_git_sensor(project, cache_dir=tmp_path / "cache", reload=reloaded.append)
    with dg.instance_for_test() as instance:
        assert "watching" in tick(sensor, None, instance)[1]
    assert reloaded == []


def test_a_project_that_was_loaded_broken_is_reloaded_once_it_is_mended(
    project: Path, tmp_path: Path
) -> None:
    (project / "valohai.yaml").write_text("- step: {}\n")
    commit(project)
    load_valohai_project(project, cache_dir=tmp_path / "cache")
    (project / "valohai.yaml").write_text(YAML)
    commit(project)
    reloaded: list[str] = []
    sensor = build_git_sensor(project, cache_dir=tmp_path / "cache", reload=reloaded.append)
    with dg.instance_for_test() as instance:
        tick(sensor, None, instance)
    assert reloaded == ["digits"]


def test_a_run_process_knows_the_commit_that_the_code_server_loaded(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer commit must not slip into a run that was launched from an older graph."""
    from valohai_dagster.plugin import loaded

    cache, url = tmp_path / "cache", f"file://{project}"
    first = load_project(url, name="digits", cache_dir=cache).commit.identifier
    (project / "train.py").write_text("print(2)")
    commit(project)
    newest = load_project(url, name="digits", cache_dir=cache, fetch=True).commit.identifier
    assert newest != first
    monkeypatch.setattr(loaded, "code_location_pin", lambda pin: first)
    found = specs(load_valohai_project(url, name="digits", cache_dir=cache))
    assert found[AssetKey(["digits", "train"])].metadata["commit"] == first


def test_a_failed_reload_is_tried_again_at_the_next_tick(project: Path, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise ServiceUnavailable("the webserver is away")

    sensor = build_git_sensor(project, cache_dir=tmp_path / "cache", reload=refuse)
    with dg.instance_for_test() as instance:
        cursor, _ = tick(sensor, None, instance)
        (project / "a.txt").write_text("x")
        commit(project)
        after, message = tick(sensor, cursor, instance)
    assert after == cursor
    assert "webserver is away" in message


def answering(reply: dict[str, Any], status: int = 200) -> httpx.Client:
    return httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(status, json=reply))
    )


def test_a_reload_that_loads_is_silent() -> None:
    entry = {
        "__typename": "WorkspaceLocationEntry",
        "locationOrLoadError": {"__typename": "RepositoryLocation"},
    }
    reload_code_location(
        "http://x", "l", client=answering({"data": {"reloadRepositoryLocation": entry}})
    )


def test_a_reload_that_does_not_load_tells_why() -> None:
    entry = {
        "__typename": "WorkspaceLocationEntry",
        "locationOrLoadError": {"__typename": "PythonError", "message": "no such module"},
    }
    with pytest.raises(RefusedError, match="no such module"):
        reload_code_location(
            "http://x", "l", client=answering({"data": {"reloadRepositoryLocation": entry}})
        )


def test_an_absent_webserver_is_named() -> None:
    with pytest.raises(ServiceUnavailable, match="webserver_url"):
        reload_code_location("http://x", "l", client=answering({}, 502))
