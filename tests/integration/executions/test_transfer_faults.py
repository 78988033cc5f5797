"""What networks, stores and machines do to transfers, with the whole product: service, agent process, object store.

In each case the execution ends right or with a clear error, nothing partial is ever an output, and the sweep leaves
nothing behind. The store is moto behind `FaultyProxy`; the agent is a process of its own with little patience.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.deployment import Background
from tests.support.faulty_proxy import BUSY, EXPIRED, Asked, Fault, FaultyProxy, faulty_proxy
from tests.support.projects import spec_of, step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.remote_stores import section_of
from tests.support.servers.s3_stores import PART_BYTES, s3_client, s3_store
from tests.support.service import RunningService, running_service, static_settings
from valohai_dagster.executions import late_logs, sweeping
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.stores.s3 import S3Store

MIB = 1024 * 1024
LARGE = 3 * PART_BYTES + 1  # bytes; four parts
INPUT = bytes(range(256)) * (LARGE // 256)
DIGEST = hashlib.sha256(INPUT).hexdigest()
COMMAND = "cp /valohai/inputs/data/in.bin /valohai/outputs/out.bin; echo small > /valohai/outputs/small.txt"


@dataclass(kw_only=True)
class Scene:
    """One deployment whose store `far` is behind the proxy; `direct` reaches it without."""

    service: RunningService
    proxy: FaultyProxy
    direct: S3Store
    redis_url: str
    root: Path
    agents: list[Background] = field(default_factory=list)

    def start_agent(self, *before: str) -> Background:
        """`before`: a command that starts it."""
        name = f"agent-{len(self.agents)}"
        command = [sys.executable, "-m", "tests.support.hasty_agent", "run", "--queue", "local"]
        command += ["--name", name, "--work-dir", str(self.root / "work"), "--runtime", "process"]
        (self.root / "work").mkdir(exist_ok=True)
        environment = {"VALOHAI_AGENT_REDIS": self.redis_url}
        agent = Background([*before, *command], self.root / f"{name}.log", environment)
        self.agents.append(agent)
        return agent

    def submit(self, command: str = COMMAND) -> str:
        self.direct.put("in/in.bin", INPUT)
        extra = f"inputs:\n  - name: data\n    default: {self.direct.uri('in/in.bin')}\n"
        project = write_project(self.root / "project", step_yaml(command, extra=extra))
        spec = spec_of(project, "run", self.service.settings)
        self.service.client.submit(spec)
        return spec.execution_id

    def end(self, execution_id: str) -> ExecutionView:
        return ExecutionView.model_validate(self.service.final(execution_id, timeout=90).data)

    def run(self, command: str = COMMAND) -> ExecutionView:
        execution_id = self.submit(command)
        self.start_agent()
        return self.end(execution_id)

    def check(self, view: ExecutionView) -> None:
        """Nothing partial is an output, and after the sweep the store holds what the records know."""
        self.proxy.rule = lambda asked: None

        async def sweep(running: ExecutionService) -> None:
            now = running.clock()
            running.sweeper.clock = lambda: now + timedelta(days=2)
            await running.sweeper.sweep()

        self.service.call(sweep)
        with self.service.records.read() as conn:
            grants = conn.execute(sa.select(t.grants)).all()
            archive = conn.execute(sa.select(t.commits.c.archive_key)).scalar_one()
            logs = conn.execute(sa.select(t.attempts.c.logs)).scalars().all()
        known = {"in/in.bin", archive, *(row.key for row in grants if row.accepted)}
        known |= {log["key"] for streams in logs for log in streams.values()}  # salvaged ones too
        assert {found.key for found in self.direct.list("")} == known
        for row in grants:
            assert (row.swept_at is None) is row.accepted
        with closing(s3_client(self.direct._section.endpoint_url or "")) as client:
            assert "Uploads" not in client.list_multipart_uploads(Bucket=self.direct.place)
        for output in view.outputs:
            key = next(row.key for row in grants if row.upload_id == output.id)
            with self.direct.open(key) as stored:
                content = stored.read()
            assert hashlib.sha256(content).hexdigest() == output.sha256


@pytest.fixture
def scene(
    settings: Settings,
    redis_server: RedisServer,
    moto_server: str,
    namespaces: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Scene]:
    monkeypatch.setattr(sweeping, "SWEEP_SECONDS", 3600.0)
    monkeypatch.setattr(late_logs, "LOOK_SECONDS", 3600.0)
    direct = s3_store(moto_server)
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(faulty_proxy(moto_server))
        section = section_of(direct, endpoint_url=proxy.url)
        values: dict[str, Any] = {"stores": {"far": section}, "default_store": "far"}
        service = stack.enter_context(running_service(static_settings(settings, **values)))
        made = Scene(
            service=service,
            proxy=proxy,
            direct=direct,
            redis_url=redis_server.unix_url,
            root=tmp_path,
        )
        yield made
        proxy.end()
        for agent in made.agents:
            agent.stop()


def good(view: ExecutionView) -> None:
    assert (view.status, view.reason) == (ExecutionStatus.complete, None)
    assert {o.name: o.size for o in view.outputs} == {"out.bin": len(INPUT), "small.txt": 6}
    assert next(o for o in view.outputs if o.name == "out.bin").sha256 == DIGEST


def test_connections_that_are_reset_every_few_megabytes(scene: Scene):
    """Each transfer of more than 4 MB breaks off the first times; downloads go on where they were."""

    def rule(asked: Asked) -> Fault | None:
        return Fault(reset_after=4 * MIB) if asked.number <= 3 else None

    scene.proxy.rule = rule
    view = scene.run()
    good(view)
    assert scene.proxy.struck >= 4
    scene.check(view)


def test_a_storm_of_503(scene: Scene):
    scene.proxy.rule = lambda asked: BUSY if asked.number <= 3 else None
    view = scene.run()
    good(view)
    assert scene.proxy.struck >= 6
    scene.check(view)


def test_a_server_that_goes_silent_in_mid_transfer(scene: Scene):
    scene.proxy.rule = lambda asked: Fault(silent_after=MIB) if asked.number == 2 else None
    view = scene.run()
    good(view)
    assert scene.proxy.silent.is_set()
    scene.check(view)


def test_signatures_that_run_out_in_mid_transfer(scene: Scene):
    """The first URLs break off and are expired when they are used again; fresh ones are asked for."""
    asked_for: Counter[str] = Counter()

    def rule(asked: Asked) -> Fault | None:
        name = asked.path.partition("?")[0]
        if not name.endswith(".bin"):
            return None
        what = f"{asked.method} {asked.part}"
        asked_for[what] += 1
        if asked_for[what] > 2:
            return None
        broken = asked_for[what] == 1 and asked.method != "POST"
        return Fault(reset_after=2 * MIB) if broken else EXPIRED

    scene.proxy.rule = rule
    view = scene.run()
    good(view)
    assert {what: count >= 3 for what, count in asked_for.items()} == dict.fromkeys(
        ("GET None", "PUT 1", "PUT 2", "PUT 3", "POST None"), True
    )
    scene.check(view)


def test_an_input_that_is_shorter_than_it_says(scene: Scene):
    """The store's listing knew another size; the execution says which file it was and has no output."""

    def rule(asked: Asked) -> Fault | None:
        return Fault(only=10) if "in/in.bin" in asked.path else None

    scene.proxy.rule = rule
    view = scene.run()
    assert view.status is ExecutionStatus.error
    assert "in.bin" in str(view.reason)
    assert view.outputs == []
    scene.check(view)


def test_an_input_whose_content_is_not_what_was_stored(scene: Scene):
    """A datum knows its checksums: one wrong byte is found, and nothing of it reaches the command."""
    first = scene.run()
    good(first)
    datum = next(o for o in first.outputs if o.name == "out.bin")
    extra = f"inputs:\n  - name: data\n    default: datum://{datum.id}\n"
    project = write_project(scene.root / "second", step_yaml("ls /valohai/inputs", extra=extra))
    spec = spec_of(project, "run", scene.service.settings)

    def rule(asked: Asked) -> Fault | None:
        return (
            Fault(change_at=MIB + 1) if asked.path.partition("?")[0].endswith("out.bin") else None
        )

    scene.proxy.rule = rule
    for agent in scene.agents:
        agent.stop()  # its cache has the file
    scene.root = scene.root / "elsewhere"
    scene.root.mkdir()
    scene.start_agent()
    scene.service.client.submit(spec)
    view = scene.end(spec.execution_id)
    assert view.status is ExecutionStatus.error
    assert "checksum" in str(view.reason) or "sha256" in str(view.reason)
    assert "out.bin" in str(view.reason) or datum.id in str(view.reason)


def test_a_disk_that_is_too_small_for_the_inputs(scene: Scene):
    work = shlex.quote(str(scene.root / "work"))
    mount = f'mkdir -p {work} && mount -t tmpfs -o size=8m none {work} && exec "$@"'
    execution_id = scene.submit()
    scene.start_agent("unshare", "--mount", "sh", "-c", mount, "sh")
    view = scene.end(execution_id)
    assert view.status is ExecutionStatus.error
    assert "space" in str(view.reason).lower()
    assert view.outputs == []
    scene.check(view)


def test_a_worker_that_is_killed_in_mid_upload(scene: Scene):
    """The next attempt does it all again; the parts of the first one are gone in the end."""
    scene.proxy.rule = lambda asked: Fault(silent_after=MIB) if asked.part == 2 else None
    execution_id = scene.submit()
    agent = scene.start_agent()
    assert scene.proxy.silent.wait(60)
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait()
    scene.proxy.rule = lambda asked: None

    async def lose(running: ExecutionService) -> None:
        active = running.memory.active[execution_id]
        await running._losses.requeue(active, "the test says so")

    scene.service.call(lose)
    scene.start_agent()
    view = scene.end(execution_id)
    good(view)
    assert len(view.attempts) == 2
    scene.check(view)
