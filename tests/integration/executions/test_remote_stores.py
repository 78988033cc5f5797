"""The whole product on stores behind a network: a conductor process, an agent process that sees no local store, real
commands; code, inputs, outputs and logs lie in the object store. One story for every kind of server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from tests.support.deployment import Deployment
from tests.support.projects import step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.remote_stores import KINDS, make_remote, section_of, toml_of
from valohai_dagster.executions.stream import EventKind, ExecutionStatus
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import open_records
from valohai_dagster.stores.base import Store
from valohai_dagster.stores.registry import open_stores

LARGE_BYTES = 11 * 1024 * 1024 + 1  # three parts on every store of the tests
INPUT = b"one,two\n" * 1000

COMMAND = f"""
python3 - <<'PY'
import os, time
inputs = "/valohai/inputs/data"
print("inputs", sorted(os.listdir(inputs)))
content = open(inputs + "/a.csv", "rb").read()
outputs = "/valohai/outputs/"
open(outputs + "copy.csv", "wb").write(content)
open(outputs + "live.txt", "w").write("live")
os.chmod(outputs + "live.txt", 0o444)
while os.path.exists(outputs + "live.txt"):
    time.sleep(0.1)
open(outputs + "large.bin", "wb").write(bytes(range(256)) * ({LARGE_BYTES} // 256) + b"e" * ({LARGE_BYTES} % 256))
PY
echo the last line
"""
LARGE = bytes(range(256)) * (LARGE_BYTES // 256) + b"e" * (LARGE_BYTES % 256)


@pytest.fixture(params=list(KINDS))
def store(request: pytest.FixtureRequest) -> Store:
    return make_remote(request.param, request)


@pytest.fixture
def deployment(
    store: Store, redis_server: RedisServer, namespaces: None, tmp_path: Path
) -> Iterator[Deployment]:
    toml = f"""
    redis_url = "{redis_server.unix_url}"
    http_port = 0
    default_group = "far"
    default_store = "far"
    sweep_after_seconds = 0
    [groups.far]
    kind = "static"
    local_stores = false
    """
    with Deployment(tmp_path / "deployment", toml + toml_of("far", section_of(store))) as made:
        yield made


def page(deployment: Deployment, path: str) -> bytes:
    answer = httpx.get(f"{deployment.settings.base_url}{path}", follow_redirects=True)
    answer.raise_for_status()
    return answer.content


def test_code_inputs_outputs_and_logs_lie_in_the_remote_store(
    deployment: Deployment, store: Store, redis_server: RedisServer, tmp_path: Path
):
    store.put("in/a.csv", INPUT)
    store.put("in/b.csv", b"b")
    extra = f"inputs:\n  - name: data\n    default: {store.uri('in/*.csv')}\n"
    project = write_project(tmp_path / "project", step_yaml(COMMAND, extra=extra))
    deployment.start_conductor()
    deployment.start_agent("far", redis_server.unix_url, "--runtime", "process")
    view, events = deployment.execute(project)
    told = [event.message for event in events]
    assert (view.status, view.reason) == (ExecutionStatus.complete, None), told
    assert not [event.message for event in events if event.kind is EventKind.warning]

    # what the pages of the service show
    outputs = {output.name: output for output in view.outputs}
    contents = {"copy.csv": INPUT, "live.txt": b"live", "large.bin": LARGE}
    assert outputs.keys() == contents.keys()
    for name, content in contents.items():
        assert outputs[name].sha256 == hashlib.sha256(content).hexdigest()
        assert page(deployment, f"/datum/{outputs[name].id}") == content
    log = page(deployment, f"/log/{view.id}/1/stdout").decode()
    assert log == "inputs ['a.csv', 'b.csv']\nthe last line\n"

    # what the records say and what lies in the store is the same
    records = open_records(deployment.settings)
    with records.read() as conn:
        grants = conn.execute(sa.select(t.grants)).all()
        inputs = conn.execute(sa.select(t.execution_inputs)).all()
        archive = conn.execute(sa.select(t.commits.c.archive_key)).scalar_one()
    records.close()
    assert {(row.store, row.accepted) for row in grants} == {("far", True)}
    assert [row.name for row in grants if row.parts is not None] == ["large.bin"]
    assert {row.sha256 for row in inputs} == {
        hashlib.sha256(content).hexdigest() for content in (INPUT, b"b")
    }
    lies = {found.key for found in open_stores(deployment.settings)["far"].list("")}
    assert lies == {"in/a.csv", "in/b.csv", archive, *(row.key for row in grants)}
