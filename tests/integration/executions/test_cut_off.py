"""Workers that are cut off for 5, 30, 120 and 400 seconds (the protocol's table of losses; L-33).

Real agents in network namespaces, a real cable that is pulled, real commands. All times of the agents and of the
service are divided by a factor, and so are the cuts; nothing else is changed. The store is a directory of this host,
so what is cut is Redis: an output that is uploaded meanwhile cannot be reported.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.cut_off import Machine
from tests.support.ports import wait_for
from tests.support.projects import spec_of, step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, running_service
from valohai_agent.protocol import LEASE_SECONDS
from valohai_dagster.executions import service as service_module
from valohai_dagster.executions import watch
from valohai_dagster.executions.service import TICK_SECONDS
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, ExecutionView, FollowEvent
from valohai_dagster.records import tables as t
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import StaticGroupSettings

GRACE_SECONDS = 300.0
COMMAND = """
last=$FIRST; [ $VALOHAI_ATTEMPT = 1 ] || last=5
i=0
while [ $i -lt $last ]; do echo "{\\"i\\": $i}"; i=$((i+1)); sleep 0.1; done
echo $VALOHAI_ATTEMPT > /valohai/outputs/result.txt
"""


class Cut:
    """One worker group with its executions and machines."""

    def __init__(self, lab: Lab, group: str, *, seconds: float, lines: int) -> None:
        self._lab, self.group, self.seconds = lab, group, seconds
        self.machine = lab.machine(group)
        variables = {"FIRST": str(lines)}
        self.spec = spec_of(
            lab.project, "run", lab.settings, environment=group, environment_variables=variables
        )
        self.lines = lines
        lab.service.client.submit(self.spec)
        self._printed(3)

    def _printed(self, lines: int) -> None:
        keys, name = self._lab.service.keys, self._lab.redis
        key = keys.log(self.group, self.spec.execution_id, 1)
        with name.client() as client:
            wait_for(lambda: client.xlen(key) > lines + 10, seconds=30, what="the command's output")

    def cut(self) -> threading.Thread:
        """The cable is out for that long."""

        def run() -> None:
            self.machine.pull_cable()
            threading.Event().wait(self.seconds / self._lab.factor)
            self.machine.plug_in()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def end(self) -> tuple[ExecutionView, list[FollowEvent]]:
        told = self._lab.service.events(
            self.spec.execution_id, lambda e: e.kind is EventKind.final, timeout=60
        )
        return ExecutionView.model_validate(told[-1].data), told

    def measured(self) -> Counter[tuple[int, int]]:
        """(attempt, i) of all metadata that was applied."""
        c = t.metadata_events.c
        query = sa.select(c.attempt, c["values"]).where(c.execution_id == self.spec.execution_id)
        with self._lab.service.records.read() as conn:
            return Counter((row.attempt, row.values["i"]) for row in conn.execute(query))

    def result(self, view: ExecutionView) -> bytes:
        (output,) = view.outputs
        assert self._lab.service.service is not None
        stores = self._lab.service.service.stores
        with self._lab.service.records.read() as conn:
            row = conn.execute(sa.select(t.datums).where(t.datums.c.id == output.id)).one()
        with stores[row.store].open(row.key) as file:
            return file.read()


class Lab:
    def __init__(
        self,
        stack: ExitStack,
        service: RunningService,
        redis: RedisServer,
        root: Path,
        factor: float,
    ) -> None:
        self._stack, self._root = stack, root
        self.service, self.redis, self.factor = service, redis, factor
        self.settings = service.settings
        self.project = write_project(root / "project", step_yaml(COMMAND))

    def machine(self, group: str) -> Machine:
        """Another machine of the group, with an agent that has checked in."""
        machine = self._stack.enter_context(Machine())
        deployment = self.service.keys.deployment
        work = self._root / machine.name
        where = {"group": group, "deployment": deployment, "factor": self.factor}
        machine.start_agent(self.redis.port, work, **where)
        key = self.service.keys.worker(group, machine.name)
        with self.redis.client() as client:
            wait_for(lambda: client.exists(key), seconds=30, what=(work / "agent.log").read_text())
        return machine


OpenLab = Callable[..., Lab]


@pytest.fixture
def open_lab(
    settings: Settings, short_tmp: Path, namespaces: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenLab]:
    with ExitStack() as stack:

        def open_one(factor: float, *groups: str) -> Lab:
            anywhere = ("--bind", "0.0.0.0", "--protected-mode", "no")
            redis = RedisServer(short_tmp / "redis", options=anywhere).start()
            stack.callback(redis.stop)
            monkeypatch.setattr(service_module, "TICK_SECONDS", TICK_SECONDS / factor)
            group: Any = StaticGroupSettings(kind="static")
            changed = {
                "groups": {"local": group, **dict.fromkeys(groups, group)},
                "redis_url": redis.unix_url,
                "lost_grace_seconds": GRACE_SECONDS / factor,
            }
            values = Settings(**{**settings.model_dump(), **changed})
            service = stack.enter_context(running_service(values))
            return Lab(stack, service, redis, short_tmp / "lab", factor)

        yield open_one


def texts(told: list[FollowEvent]) -> list[str]:
    return [event.message for event in told]


def once_each(attempt: int, lines: int) -> Counter[tuple[int, int]]:
    return Counter((attempt, i) for i in range(lines))


def test_l33_silence_is_told_within_30_seconds() -> None:
    """A lease that is not renewed any more runs out, and then it is looked for a few times to be sure."""
    assert LEASE_SECONDS + watch.MISSING_LOOKS * TICK_SECONDS <= 30


def test_a_worker_that_is_cut_off_for_5_or_30_seconds_goes_on(open_lab: OpenLab) -> None:
    """Ten times as fast."""
    lab = open_lab(10, "short", "medium")
    cuts = [
        Cut(lab, "short", seconds=5, lines=20),
        Cut(lab, "medium", seconds=30, lines=50),
    ]
    threads = [cut.cut() for cut in cuts]
    for cut in cuts:
        view, told = cut.end()
        assert (view.status, view.attempt) == (ExecutionStatus.complete, 1), texts(told)
        assert cut.measured() == once_each(1, cut.lines)
        assert cut.result(view) == b"1\n"
    assert not any("no sign of life" in text for text in texts(cuts[0].end()[1]))
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_a_worker_that_is_cut_off_for_120_seconds_is_suspected_and_goes_on_and_for_400_seconds_is_fenced(
    open_lab: OpenLab,
) -> None:
    """Thirty times as fast."""
    lab = open_lab(30, "long", "lost")
    long = Cut(lab, "long", seconds=120, lines=70)
    lost = Cut(lab, "lost", seconds=400, lines=1000)
    other = lab.machine("lost")
    threads = [lost.cut(), long.cut()]

    view, told = long.end()
    assert (view.status, view.attempt) == (ExecutionStatus.complete, 1), texts(told)
    assert any("no sign of life" in text for text in texts(told))
    assert any("is back, the attempt goes on" in text for text in texts(told))
    assert long.measured() == once_each(1, long.lines)
    assert long.result(view) == b"1\n"

    view, told = lost.end()
    assert view.status is ExecutionStatus.complete, texts(told)
    assert [(a.worker, a.end) for a in view.attempts] == [
        (lost.machine.name, "lost"),
        (other.name, "finished"),
    ]
    assert view.latest_metadata["i"] == 4
    for thread in threads:
        thread.join()
    # It is back and still computes: it is fenced, and nothing of what it did meanwhile has any effect.
    keys = lab.service.keys
    with lab.redis.client() as client:
        worker = keys.worker("lost", lost.machine.name)
        wait_for(lambda: client.hget(worker, "busy") == b"0", seconds=30, what="the fenced worker")
    end = lab.service.client.view(view.id)
    assert end is not None
    assert end == view
    measured = lost.measured()
    assert set(measured.values()) == {1}
    assert Counter({key: n for key, n in measured.items() if key[0] == 2}) == once_each(2, 5)
    assert lost.result(end) == b"2\n"
