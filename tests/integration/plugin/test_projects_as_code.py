"""Projects from real directories: loading, broken ones, the component, and the sensor for new commits."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
from dagster import AssetKey, DagsterInstance

from valohai_dagster import ProjectError, ValohaiProjectComponent, load_valohai_project
from valohai_dagster.errors import RefusedError, ServiceUnavailable
from valohai_dagster.plugin.git_sensor import build_git_sensor
from valohai_dagster.plugin.reload import reload_code_location

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


def test_an_unsupported_key_is_said_in_the_description(project: Path, tmp_path: Path) -> None:
    found = specs(load_valohai_project(project, cache_dir=tmp_path / "cache"))
    description = found[AssetKey(["digits", "train"])].description or ""
    assert "Not supported here" in description
    assert "resources" in description


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
