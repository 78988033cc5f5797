"""Agents on machines that are announced to go away: notices by HTTP, signals, what is stored, what is reported.

The metadata services are stand-ins (see `tests.support.metadata_stand_in`); everything else is real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

from tests.support.agent_conductor import GROUP, Conductor
from tests.support.agent_process import AgentProcess
from tests.support.metadata_stand_in import MACHINE, MetadataStandIn
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.metadata_service import Cloud, Unanswered
from valohai_agent.preemption import Notice, PreemptionWatch, notices_of
from valohai_agent.protocol import Outcome, OutputStored, Preempted, StopAcknowledged

SAVES_WHEN_INTERRUPTED = (
    "python3 -u -c 'import json, time\n"
    'print("ready")\n'
    "try:\n"
    "    time.sleep(60)\n"
    "except KeyboardInterrupt:\n"
    '    left = json.load(open("/valohai/config/preemption.json"))["seconds_left"]\n'
    '    open("/valohai/outputs/checkpoint", "w").write(str(left > 0))\n'
    "'"
)
STUBBORN = "trap '' INT; trap 'echo term > /valohai/outputs/term; exit 1' TERM; echo ready; while true; do sleep 0.1; done"


def soon(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


def announce(services: MetadataStandIn, cloud: Cloud, gone_at: datetime) -> None:
    """`gone_at` is told in whole seconds; Google Cloud tells no time."""
    if cloud is Cloud.aws:
        services.aws_action = {
            "action": "terminate",
            "time": gone_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
    elif cloud is Cloud.gcp:
        services.google["preempted"] = "TRUE"
    else:
        services.azure_events = [
            {
                "EventId": "event-1",
                "EventType": "Preempt",
                "Resources": [MACHINE],
                "NotBefore": format_datetime(gone_at, usegmt=True),
            }
        ]


@pytest.fixture
def services() -> Iterator[MetadataStandIn]:
    with MetadataStandIn() as services:
        yield services


StartAgent = Callable[..., AgentProcess]


@pytest.fixture
def start_agent(
    short_tmp: Path, namespaces: None, services: MetadataStandIn, redis_server: RedisServer
) -> Iterator[StartAgent]:
    started: list[AgentProcess] = []

    def start(cloud: Cloud, *, runtime: str = "process") -> AgentProcess:
        where = ("--cloud", cloud.value, "--metadata-url", services.url)
        url = redis_server.unix_url
        started.append(AgentProcess(url, short_tmp / "work", *where, runtime=runtime))
        return started[-1]

    yield start
    for agent in started:
        agent.stop()


def ready(conductor: Conductor, execution_id: str) -> None:
    wait_for(
        lambda: ("stdout", "ready") in conductor.live_lines(execution_id), seconds=20, what="ready"
    )


def outputs(conductor: Conductor, execution_id: str) -> dict[str, bytes]:
    stored = conductor.applied(execution_id).bodies(OutputStored)
    return {body.name: (conductor.store / body.upload_id).read_bytes() for body in stored}


@pytest.mark.parametrize("cloud", list(Cloud))
def test_k53_l30_a_notice_interrupts_the_command_and_what_it_saves_is_stored(
    conductor: Conductor, start_agent: StartAgent, services: MetadataStandIn, cloud: Cloud
) -> None:
    agent = start_agent(cloud)
    execution_id = conductor.submit(SAVES_WHEN_INTERRUPTED)
    ready(conductor, execution_id)
    announce(services, cloud, soon(40))
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.preempted) == (Outcome.error, True)
    assert "reclaims" in str(finished.reason) or "Azure ends" in str(finished.reason)
    assert outputs(conductor, execution_id) == {"checkpoint": b"True"}
    applied = conductor.applied(execution_id)
    (told,) = applied.bodies(Preempted)
    assert told.seconds_left is not None
    assert 10 < told.seconds_left <= 40
    assert [s.signal for s in applied.bodies(StopAcknowledged)] == ["SIGINT"]
    assert agent.wait() == 0, "it takes nothing new"
    assert services.refused == []
    assert services.acknowledged == (["event-1"] if cloud is Cloud.azure else [])
    log = conductor.stored_log(execution_id, "stderr").decode()
    assert "s are left; the last quarter is for the outputs" in log


def test_k53_who_ignores_sigint_gets_sigterm_in_time(
    conductor: Conductor, start_agent: StartAgent, services: MetadataStandIn
) -> None:
    start_agent(Cloud.aws)
    execution_id = conductor.submit(STUBBORN)
    ready(conductor, execution_id)
    announce(services, Cloud.aws, soon(10))
    finished = conductor.finished(execution_id)
    assert finished.preempted
    assert outputs(conductor, execution_id) == {"term": b"term\n"}
    signals = [s.signal for s in conductor.applied(execution_id).bodies(StopAcknowledged)]
    assert signals == ["SIGINT", "SIGTERM"]


@pytest.mark.docker
def test_k53_a_container_is_interrupted_and_told_how_much_time_is_left(
    conductor: Conductor, start_agent: StartAgent, services: MetadataStandIn, docker_image: str
) -> None:
    start_agent(Cloud.gcp, runtime="docker")
    execution_id = conductor.submit(SAVES_WHEN_INTERRUPTED, image=docker_image)
    ready(conductor, execution_id)
    announce(services, Cloud.gcp, soon(30))
    assert conductor.finished(execution_id).preempted
    assert outputs(conductor, execution_id) == {"checkpoint": b"True"}


def test_a_draining_agent_is_seen_as_such_and_nothing_begins_on_a_machine_that_goes(
    conductor: Conductor, start_agent: StartAgent, services: MetadataStandIn
) -> None:
    announce(services, Cloud.aws, soon(100))
    agent = start_agent(Cloud.aws)
    execution_id = conductor.submit("echo never")
    assert agent.wait() == 0
    assert conductor.redis.zscore(conductor.keys.ready(GROUP), execution_id) is not None


def test_the_last_agent_of_a_machine_acknowledges(
    services: MetadataStandIn, tmp_path: Path
) -> None:
    told: list[Notice | None] = []
    announce(services, Cloud.azure, soon(100))
    watches = [
        PreemptionWatch(
            notices_of(Cloud.azure, services.url), on_notice=told.append, directory=tmp_path
        )
        for _ in range(2)
    ]
    for watch in watches:
        watch.look()
        watch.look()
    assert [one and one.event for one in told] == ["event-1", "event-1"], "once for each agent"
    watches[0].close()
    assert services.acknowledged == []
    watches[1].close()
    assert services.acknowledged == ["event-1"]


def test_a_silent_metadata_service_is_told_once_and_forgiven(
    services: MetadataStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Notice | None] = []
    watch = PreemptionWatch(
        notices_of(Cloud.aws, services.url), on_notice=told.append, directory=tmp_path
    )
    services.broken = True
    watch.look()
    watch.look()
    assert [r.__dict__["action"] for r in caplog.records] == ["metadata-silent"]
    services.broken = False
    watch.look()
    assert told == []
    services.tokens.clear()  # they run out after six hours
    announce(services, Cloud.aws, soon(100))
    watch.look()
    assert len(told) == 1
    watch.close()


def test_k53_a_second_notice_that_leaves_less_time_counts(
    conductor: Conductor, start_agent: StartAgent, services: MetadataStandIn
) -> None:
    """The host of an Azure machine fails and is to be left within days; then the machine is reclaimed."""
    start_agent(Cloud.azure)
    execution_id = conductor.submit(SAVES_WHEN_INTERRUPTED)
    ready(conductor, execution_id)
    announce(services, Cloud.azure, soon(7 * 86400))
    wait_for(
        lambda: conductor.applied(execution_id).bodies(Preempted), seconds=20, what="first notice"
    )
    announce(services, Cloud.azure, soon(40))
    finished = conductor.finished(execution_id)
    assert finished.preempted
    assert outputs(conductor, execution_id) == {"checkpoint": b"True"}
    first, second = conductor.applied(execution_id).bodies(Preempted)
    assert (first.seconds_left or 0) > 86400 > 40 >= (second.seconds_left or 0)


def test_k53_a_notice_that_is_taken_back_interrupts_nothing(
    conductor: Conductor, start_agent: StartAgent, services: MetadataStandIn, tmp_path: Path
) -> None:
    agent = start_agent(Cloud.azure)
    go = tmp_path / "go"
    execution_id = conductor.submit(f"echo ready; while [ ! -e {go} ]; do sleep 0.1; done")
    ready(conductor, execution_id)
    announce(services, Cloud.azure, soon(7 * 86400))
    wait_for(lambda: conductor.applied(execution_id).bodies(Preempted), seconds=20, what="notice")
    services.azure_events = []
    wait_for(lambda: "taken back" in agent.log, seconds=20, what="the agent sees it")
    go.touch()
    finished = conductor.finished(execution_id)
    assert (finished.outcome, finished.preempted) == (Outcome.complete, False)
    told = conductor.applied(execution_id).bodies(Preempted)
    assert [one.withdrawn for one in told] == [False, True]
    assert agent.wait() == 0, "it takes nothing new all the same"
    assert services.acknowledged == []


def test_a_metadata_service_that_is_not_there_is_an_error_of_its_own() -> None:
    with MetadataStandIn() as gone:
        url = gone.url
    with pytest.raises(Unanswered):
        notices_of(Cloud.gcp, url).look(soon(0))


def test_the_answer_of_a_metadata_service_is_read_as_its_cloud_writes_it(
    services: MetadataStandIn,
) -> None:
    for cloud in Cloud:
        notices = notices_of(cloud, services.url)
        assert notices.look(soon(0)) is None
        announce(services, cloud, soon(100))
        found = notices.look(soon(0))
        assert found is not None
        notices.acknowledge(found)
    assert services.acknowledged == ["event-1"]
    assert json.dumps(services.refused) == "[]"
