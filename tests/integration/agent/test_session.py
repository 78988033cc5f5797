"""Names, heartbeats and taking jobs, against a real server."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.agent_conductor import GROUP, Conductor
from tests.support.agent_sessions import LEASE_SECONDS, OpenSession
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.protocol import PROTOCOL_VERSION, Leased, Outcome
from valohai_agent.redis_link import NoDeployment, RedisRefused, connect, find_deployment
from valohai_agent.session import NameTaken, UnreadableJob


def test_a_registered_worker_is_seen_with_its_facts(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url, slots=3, runtime="process")
    entry = conductor.worker("w1")
    assert entry["incarnation"] == session.incarnation
    assert (entry["slots"], entry["state"], entry["runtime"]) == ("3", "idle", "process")
    session.busy = 1
    session.changed()
    wait_for(lambda: conductor.worker("w1")["state"] == "busy", what="the busy state")


def test_the_heartbeat_keeps_the_name_and_closing_frees_it_at_once(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    time.sleep(LEASE_SECONDS * 1.5)
    assert conductor.worker("w1")
    session.close()
    wait_for(lambda: not conductor.worker("w1"), seconds=1, what="the entry to go")


def test_two_agents_with_one_name_the_second_is_refused_in_words(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    first = open_session(redis_server.unix_url)
    second = open_session(redis_server.unix_url, register=False)
    with pytest.raises(NameTaken, match=r"'w1' is in use in group 'g1'.*another --name"):
        second.register()
    assert conductor.worker("w1")["incarnation"] == first.incarnation


def test_the_name_of_a_dead_agent_is_free_after_its_lease(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    key = conductor.keys.worker(GROUP, "w1")
    conductor.redis.fcall("vh1_heartbeat", 1, key, "dead", int(LEASE_SECONDS * 1000))
    assert open_session(redis_server.unix_url).incarnation == conductor.worker("w1")["incarnation"]


def test_an_agent_whose_name_was_taken_meanwhile_goes_on_under_another(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    conductor.redis.hset(conductor.keys.worker(GROUP, "w1"), "incarnation", "other")
    wait_for(lambda: session.name.startswith("w1-"), what="the new name")
    wait_for(lambda: conductor.worker(session.name), what="the entry of the new name")
    conductor.enqueue(conductor.job("true"))
    assert session.take() is not None


def test_jobs_are_taken_in_order_requeued_ones_first(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    first, second = conductor.submit("true"), conductor.submit("true")
    requeued = conductor.enqueue(conductor.job("true"), front=True)
    taken = [session.take() for _ in range(4)]
    assert [lease and lease.execution_id for lease in taken] == [requeued, first, second, None]


def test_a_job_is_never_handed_out_twice(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    sessions = [open_session(redis_server.unix_url, f"w{n}") for n in range(4)]
    submitted = {conductor.submit("true") for _ in range(60)}
    taken: list[str] = []

    def take_all(number: int) -> None:
        while lease := sessions[number].take():
            taken.append(lease.execution_id)

    threads = [threading.Thread(target=take_all, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 60
    assert set(taken) == submitted


def test_a_draining_agent_takes_nothing(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    conductor.submit("true")
    session.draining = True
    session.beat()
    assert session.take() is None


@pytest.mark.parametrize(
    ("low", "high", "understood"), [(1, 1, False), (1, 2, True), (2, 3, True), (3, 4, False)]
)
def test_a_job_goes_only_to_an_agent_whose_range_has_its_version(
    conductor: Conductor,
    redis_server: RedisServer,
    open_session: OpenSession,
    low: int,
    high: int,
    understood: bool,
) -> None:
    session = open_session(redis_server.unix_url, protocol_min=low, protocol_max=high)
    conductor.enqueue(conductor.job("true"), version=2)
    assert (session.take() is not None) is understood


def test_a_job_of_a_newer_version_does_not_block_the_older_ones_behind_it(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    conductor.enqueue(conductor.job("true"), version=PROTOCOL_VERSION + 1)
    readable = conductor.submit("true")
    lease = session.take()
    assert lease is not None
    assert lease.execution_id == readable


def test_an_unreadable_job_ends_with_an_error_instead_of_going_round(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    execution_id = conductor.submit("true")
    conductor.redis.hset(conductor.keys.job(GROUP, execution_id), "job", '{"v": 1}')
    with pytest.raises(UnreadableJob):
        session.take()
    finished = conductor.finished(execution_id)
    assert finished.outcome is Outcome.error
    assert "Install the agent" in (finished.reason or "")


def test_the_bell_wakes_at_once(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    threading.Timer(0.2, conductor.submit, ("true",)).start()
    started = time.monotonic()
    session.wait_for_bell(5)
    assert time.monotonic() - started < 2


def test_a_wrong_password_is_refused_in_words(
    redis_server: RedisServer, redis_client: object
) -> None:
    url = redis_server.url.replace("redis://", "redis://nobody:secret@")
    with pytest.raises(RedisRefused, match="VALOHAI_AGENT_REDIS") as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_an_agent_started_before_redis_waits_for_it(own_redis: RedisServer) -> None:
    own_redis.kill()
    threading.Timer(0.7, own_redis.start).start()
    link = connect(own_redis.unix_url)
    assert link.client.ping()
    link.close()


def test_the_only_deployment_is_found_and_several_must_be_named(
    conductor: Conductor, redis_server: RedisServer
) -> None:
    link = connect(redis_server.unix_url)
    with pytest.raises(NoDeployment, match="no control plane"):
        find_deployment(link)
    conductor.redis.set("vh:d1:epoch", "1")
    assert find_deployment(link) == "d1"
    conductor.redis.set("vh:d2:epoch", "1")
    with pytest.raises(NoDeployment, match="d1, d2"):
        find_deployment(link)
    link.close()


def test_the_clock_offset_is_measured_and_sent_with_reports(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession
) -> None:
    session = open_session(redis_server.unix_url)
    assert abs(session.link.clock_offset_seconds) < 0.5
    session.link.clock_offset_seconds = -3600.0
    conductor.submit("true")
    lease = session.take()
    assert lease is not None
    lease.start(Leased(runtime="process"))
    applied = conductor.applied(lease.execution_id)
    assert applied.reports[0].clock_offset_seconds == -3600
    lease.close()
