"""Packages with the whole product: a conductor process writes them, an agent process unpacks them, commands see files.

On a local store and on an S3 server (O-23, I-09).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support.deployment import Deployment
from tests.support.ports import wait_for
from tests.support.projects import step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.remote_stores import make_remote, section_of, toml_of
from valohai_dagster.cli.dataset_packages import described
from valohai_dagster.data import datasets
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView, FollowEvent
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import open_records
from valohai_dagster.stores.registry import open_stores

FILES = 40
MAKE = f"""
python3 - <<'PY'
import json, os
outputs = "/valohai/outputs/"
os.makedirs(outputs + "sub")
wish = {{"valohai.dataset-versions": [{{"uri": "dataset://faces/v1", "packaging": True}}]}}
with open(outputs + "valohai.metadata.jsonl", "w") as lines:
    for number in range({FILES}):
        name = f"sub/{{number:02}}.txt"
        open(outputs + name, "w").write(f"{{number}} " * 1500)
        lines.write(json.dumps({{"file": name, "metadata": wish}}) + "\\n")
PY
"""
READ = """
python3 - <<'PY'
import hashlib, json, os
root = "/valohai/inputs/faces"
found = sorted(os.path.relpath(os.path.join(d, n), root) for d, _, names in os.walk(root) for n in names)
right = all(open(f"{root}/{n}").read() == f"{int(n[-6:-4])} " * 1500 for n in found)
listed = json.load(open("/valohai/config/inputs.json"))["faces"]["files"]
ids = {file["datum_id"] for file in listed}
print(json.dumps({"files": found, "right": right, "ids": len(ids), "uris": listed[0]["uri"][:8]}))
PY
"""
KEEP = "inputs:\n  - name: faces\n    default: dataset://faces/v1\n    keep-directories: full\n"


@pytest.fixture(params=["local", "s3"])
def deployment(
    request: pytest.FixtureRequest, redis_server: RedisServer, namespaces: None, tmp_path: Path
) -> Iterator[Deployment]:
    toml = f"""
    redis_url = "{redis_server.unix_url}"
    http_port = 0
    default_group = "far"
    package_bytes = 70000
    """
    remote = request.param == "s3"
    toml += 'default_store = "far"\n' * remote
    toml += f'[groups.far]\nkind = "static"\nlocal_stores = {json.dumps(not remote)}\n'
    toml += toml_of("far", section_of(make_remote("s3", request))) * 1 if remote else ""
    with Deployment(tmp_path / "deployment", toml) as made:
        made.start_conductor()
        keep = ("--cache-disk-percent", "100")  # also where the disk of the tests is nearly full
        made.start_agent("far", redis_server.unix_url, "--runtime", "process", *keep)
        yield made


def execute(
    deployment: Deployment, project: Path, step: str
) -> tuple[ExecutionView, list[FollowEvent]]:
    view, events = deployment.execute(project, step)
    told = [event.message for event in events]
    assert (view.status, view.reason) == (ExecutionStatus.complete, None), told
    assert not [event.message for event in events if event.kind is EventKind.warning]
    return view, events


def shown(deployment: Deployment) -> dict[str, object]:
    """How the packages stand, as `data datasets show` tells."""
    records = open_records(deployment.settings)
    with records.read() as conn:
        project = conn.execute(sa.select(t.projects.c.id)).scalar_one()
        version = datasets.get_version(conn, "dataset://faces/v1", project_id=project)
        known = described(conn, [version.id])
    records.close()
    return known[version.id]


def inputs_of(deployment: Deployment, execution_id: str) -> list[sa.Row]:
    records = open_records(deployment.settings)
    with records.read() as conn:
        mine = t.execution_inputs.c.execution_id == execution_id
        rows = list(conn.execute(sa.select(t.execution_inputs).where(mine)).all())
    records.close()
    return rows


def package_keys(deployment: Deployment) -> list[str]:
    settings = deployment.settings
    store = open_stores(settings)[settings.default_store]
    return [found.key for found in store.list("packages/")]


def test_o23_i09_a_version_goes_from_outputs_through_packages_to_inputs(
    deployment: Deployment, tmp_path: Path
):
    yaml = step_yaml(MAKE, name="make") + step_yaml(READ, name="read", extra=KEEP)
    project = write_project(tmp_path / "project", yaml)
    made, _ = execute(deployment, project, "make")
    packed = wait_for(
        lambda: known if (known := shown(deployment)).get("state") == "made" else None,
        seconds=60,
        every=0.5,
        what="the packages",
    )
    assert packed is not None
    assert packed["files"] == FILES
    assert packed["count"] == len(package_keys(deployment)) > 1

    for cached in (False, True):
        view, _ = execute(deployment, project, "read")
        answer = view.latest_metadata
        assert answer["files"] == [f"sub/{number:02}.txt" for number in range(FILES)]
        assert (answer["right"], answer["ids"], answer["uris"]) == (True, FILES, "datum://")
        rows = inputs_of(deployment, view.id)
        assert {row.datum_id for row in rows} == {output.id for output in made.outputs}
        assert {row.cached for row in rows} == {cached}

    reference = f"datum://{made.outputs[0].id}"
    deployment.done("valohai_dagster", "data", "rm", reference, "--force", "--yes")
    assert package_keys(deployment) == []
    assert shown(deployment)["state"] == "dropped"
