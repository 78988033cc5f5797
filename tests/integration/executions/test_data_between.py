"""Files from one execution to the next by dataset, model and alias, and from S3: service, agents, real commands."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import spec_of, step_yaml, write_project
from tests.support.servers.s3_stores import s3_client
from tests.support.servers.stores import fresh_name
from tests.support.service import RunningService, running_service
from valohai_dagster.data import models
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import LocalGroupSettings

MAKE = """
cd /valohai/outputs
mkdir sub
echo one > a.txt
echo two > sub/b.txt
cat > valohai.metadata.jsonl <<'END'
{"file": "a.txt", "metadata": {"valohai.dataset-versions": ["dataset://faces/v1"], "color": "red"}}
{"file": "sub/b.txt", "metadata": {"valohai.dataset-versions": [{"uri": "dataset://faces/v1", "targeting_aliases": ["best"]}]}}
{"file": "sub/b.txt", "metadata": {"valohai.model-versions": ["model://net/"]}}
END
"""
READ = "cd /valohai/inputs/data; find . -type f | sort; cat $(find . -type f | sort); cat /valohai/config/inputs.json"
INPUT = "inputs:\n  - name: data\n    keep-directories: suffix\n"


def local_group(settings: Settings, **values: Any) -> Settings:
    group = LocalGroupSettings(
        runtime="process", max_agents=1, slots=2, scale_down_grace_seconds=60
    )
    return Settings(**{**settings.model_dump(), "groups": {"local": group}, **values})


def run(
    service: RunningService, project: Path, step: str, **config: Any
) -> tuple[ExecutionView, str]:
    """The end of one execution and what it printed."""
    spec = spec_of(project, step, service.settings, **config)
    service.client.submit(spec)
    view = ExecutionView.model_validate(service.final(spec.execution_id, timeout=120).data)
    assert view.status is ExecutionStatus.complete, view.reason
    assert service.service is not None
    store, prefix = service.service.stores.log, f"logs/{view.project_id}/{view.id}/1/"
    (log,) = [stat.key for stat in store.list(prefix) if stat.key.endswith("stdout")]
    with store.open(log) as file:
        return view, file.read().decode()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    yaml = step_yaml(MAKE, name="make") + step_yaml(READ, name="read", extra=INPUT)
    return write_project(tmp_path / "project", yaml)


def stop_agents(service: RunningService) -> None:
    for agent in service.service.groups["local"].alive() if service.service else ():
        os.kill(agent.pid, signal.SIGKILL)


@pytest.fixture
def service(settings: Settings, namespaces: None) -> Iterator[RunningService]:
    with running_service(local_group(settings)) as service:
        yield service
        stop_agents(service)


def test_o11_o14_i01_k33_a_sidecar_makes_a_dataset_version_that_the_next_execution_reads(
    service: RunningService, project: Path
) -> None:
    made, _ = run(service, project, "make")
    assert made.warnings == []
    view, printed = run(service, project, "read", inputs={"data": ["dataset://faces/best"]})
    head, _, config = printed.partition("{")
    assert head.split() == ["./a.txt", "./sub/b.txt", "one", "two"]
    files = {file["name"]: file for file in json.loads("{" + config)["data"]["files"]}
    assert set(files) == {"a.txt", "sub/b.txt"}
    assert files["a.txt"]["metadata"][0]["color"] == "red"
    ids = {output.name: output.id for output in made.outputs}
    assert {name: file["datum_id"] for name, file in files.items()} == ids
    assert {i.datum_id for i in view.inputs} == set(ids.values())
    with service.records.write() as conn:
        version = models.get_version(conn, "model://net/1", project_id=view.project_id)
        models.decide(conn, version, approved=True, now=service.service.clock())  # type: ignore[union-attr]
    _, printed = run(service, project, "read", inputs={"data": ["model://net/latest"]})
    assert printed.startswith("./sub/b.txt\ntwo\n")


@pytest.fixture
def bucket(moto_server: str) -> str:
    name = fresh_name()
    with closing(s3_client(moto_server)) as client:
        client.create_bucket(Bucket=name)
        for key in ("sets/a.txt", "sets/deep/b.txt", "other"):
            client.put_object(Bucket=name, Key=key, Body=key.encode())
    return name


@pytest.fixture
def with_s3(
    settings: Settings, namespaces: None, moto_server: str, bucket: str
) -> Iterator[RunningService]:
    store = {
        "kind": "s3",
        "bucket": bucket,
        "endpoint_url": moto_server,
        "region": "us-east-1",
        "access_key_id": "testing",
        "secret_access_key": "testing",
        "readonly": True,
    }
    stores = {**settings.model_dump()["stores"], "data": store}
    with running_service(local_group(settings, stores=stores)) as service:
        yield service
        stop_agents(service)


def test_i03_i32_objects_of_a_bucket_are_inputs_and_their_changes_are_told(
    with_s3: RunningService, project: Path, bucket: str, moto_server: str
) -> None:
    uri = f"s3://{bucket}/sets/**.txt"
    view, printed = run(with_s3, project, "read", inputs={"data": [uri]})
    assert printed.startswith("./a.txt\n./deep/b.txt\nsets/a.txtsets/deep/b.txt")
    assert [i.uri for i in view.inputs] == [
        f"s3://{bucket}/sets/a.txt",
        f"s3://{bucket}/sets/deep/b.txt",
    ]
    assert view.warnings == []
    for cached in (0, 2):
        told = with_s3.events(view.id, lambda event: event.kind is EventKind.final)
        assert f"inputs: 2 files, {cached} from cache" in [event.message for event in told]
        view, _ = run(with_s3, project, "read", inputs={"data": [uri]})
    with closing(s3_client(moto_server)) as client:
        client.put_object(Bucket=bucket, Key="sets/a.txt", Body=b"changed")
    view, printed = run(with_s3, project, "read", inputs={"data": [uri]})
    assert "changedsets/deep/b.txt" in printed
    at_creation, downloaded = view.warnings
    assert f"s3://{bucket}/sets/a.txt has changed since it was last used" in at_creation
    assert f"the content of s3://{bucket}/sets/a.txt differs from its last use" in downloaded
