"""V-24: a machine is reclaimed while a command runs; the whole way with real agents, and a stand-in for the cloud."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.support.agent_process import AgentProcess
from tests.support.metadata_stand_in import MetadataStandIn
from tests.support.ports import wait_for
from tests.support.projects import spec_of, step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, running_service, static_settings
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView
from valohai_dagster.settings import Settings

TRAIN = """
cat > train.py <<'END'
import os, time
from pathlib import Path

saved = Path("/valohai/inputs/_restart/checkpoints/epoch")
outputs = Path("/valohai/outputs/checkpoints")
outputs.mkdir()
epoch = int(saved.read_text()) if saved.parent.exists() else 0
try:
    print("ready", flush=True)
    while epoch < 5 or not saved.parent.exists():
        epoch += 1
        time.sleep(0.1)
except KeyboardInterrupt:
    print("interrupted", flush=True)
(outputs / "epoch").write_text(str(max(epoch, 3)))
END
exec python3 -u train.py
"""

StartAgent = Callable[[str, MetadataStandIn], AgentProcess]


@pytest.fixture
def service(settings: Settings) -> Iterator[RunningService]:
    with running_service(static_settings(settings)) as service:
        yield service


@pytest.fixture
def start_agent(
    service: RunningService, redis_server: RedisServer, short_tmp: Path, namespaces: None
) -> Iterator[StartAgent]:
    started: list[AgentProcess] = []

    def start(name: str, cloud: MetadataStandIn) -> AgentProcess:
        options = ["--queue", "local", "--deployment", service.keys.deployment]
        options += ["--cloud", "aws", "--metadata-url", cloud.url]
        agent = AgentProcess(redis_server.unix_url, short_tmp / name, *options, name=name)
        started.append(agent)
        return agent

    yield start
    for agent in started:
        agent.stop()


def test_v24_the_next_execution_finds_what_the_interrupted_one_had_saved(
    service: RunningService, redis_server: RedisServer, start_agent: StartAgent, tmp_path: Path
) -> None:
    yaml = step_yaml(TRAIN, name="train", extra="autorestart: true\n")
    project = write_project(tmp_path / "project", yaml)
    spec = spec_of(project, "train", service.settings)
    with MetadataStandIn() as doomed, MetadataStandIn() as safe:
        first = start_agent("spot-1", doomed)
        service.client.submit(spec)
        wait_for(lambda: "ready" in printed(service, redis_server, spec.execution_id), seconds=30)
        gone_at = datetime.now(timezone.utc) + timedelta(seconds=100)
        doomed.aws_action = {
            "action": "terminate",
            "time": gone_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        assert first.wait() == 0
        start_agent("spot-2", safe)
        told = service.events(spec.execution_id, lambda e: e.kind is EventKind.final, timeout=60)
    end = ExecutionView.model_validate(told[-1].data)
    assert (end.status, end.restarts) == (ExecutionStatus.complete, 1), end.reason
    assert [(i.input, i.name) for i in end.inputs] == [("_restart", "checkpoints/epoch")]
    assert [output.name for output in end.outputs] == ["checkpoints/epoch"]
    before = service.client.view(spec.execution_id)
    assert before is not None
    assert before.status is ExecutionStatus.stopped
    assert "AWS reclaims this spot machine (terminate)" in str(before.reason)
    assert before.worker == "spot-1"
    assert end.worker == "spot-2"


def printed(service: RunningService, server: RedisServer, execution_id: str) -> str:
    with server.client() as client:
        entries = client.xrange(service.keys.log("local", execution_id, 1))
    return " ".join(fields[b"m"].decode() for _, fields in entries)  # type: ignore[union-attr]
