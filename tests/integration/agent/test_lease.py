"""One lease through outages: reports in order, nothing lost, nothing applied twice, grants only for the holder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.support.agent_conductor import GROUP, Conductor
from tests.support.agent_sessions import LEASE_SECONDS, OpenSession
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.grants import NoGrants
from valohai_agent.lease import Lease
from valohai_agent.protocol import (
    Finished,
    GrantRequest,
    Leased,
    LogLine,
    LogStream,
    MetadataEvents,
    Outcome,
    Phase,
    PhaseChanged,
    StatusDetail,
)

Take = Callable[..., Lease]


@pytest.fixture
def take(open_session: OpenSession) -> Take:
    """Submits a job, takes it and starts the lease."""

    def take_one(conductor: Conductor, server: RedisServer, **options: bool) -> Lease:
        session = open_session(server.unix_url)
        conductor.submit("true")
        lease = session.take()
        assert lease is not None
        if options.get("start", True):
            lease.start(Leased(runtime="process"))
        return lease

    return take_one


def details(conductor: Conductor, lease: Lease) -> list[str]:
    return [body.text for body in conductor.applied(lease.execution_id).bodies(StatusDetail)]


def test_reports_arrive_in_order(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    lease = take(conductor, redis_server)
    for number in range(200):
        lease.report(StatusDetail(text=str(number)))
    assert lease.reporter.flush(10)
    wait_for(lambda: len(details(conductor, lease)) == 200, what="all reports")
    assert details(conductor, lease) == [str(number) for number in range(200)]
    lease.close()


def test_progress_is_thinned_and_metadata_is_batched_without_loss(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    lease = take(conductor, redis_server)
    for number in range(3000):
        lease.reporter.progress(PhaseChanged(phase=Phase.pulling, done=number, total=3000))
        lease.reporter.metadata([{"step": number}])
    lease.report(Finished(outcome=Outcome.complete))
    conductor.finished(lease.execution_id)
    applied = conductor.applied(lease.execution_id)
    events = [event["step"] for body in applied.bodies(MetadataEvents) for event in body.events]
    assert events == list(range(3000))
    assert len(applied.bodies(PhaseChanged)) <= 3
    assert len(applied.bodies(MetadataEvents)) <= 5
    lease.close()


def test_nothing_is_lost_while_redis_is_away(
    own_conductor: Conductor, own_redis: RedisServer, take: Take
) -> None:
    lease = take(own_conductor, own_redis)
    lease.grants(10)
    own_redis.kill()
    started = time.monotonic()
    for number in range(500):
        lease.report(StatusDetail(text=str(number)))
        lease.reporter.metadata([{"n": number}])
    assert time.monotonic() - started < 1, "the job must not wait for Redis"
    time.sleep(0.5)
    own_redis.start()
    assert lease.reporter.flush(15)
    wait_for(lambda: len(details(own_conductor, lease)) == 500, what="all reports")
    assert details(own_conductor, lease) == [str(number) for number in range(500)]
    bodies = own_conductor.applied(lease.execution_id).bodies(MetadataEvents)
    assert [event["n"] for body in bodies for event in body.events] == list(range(500))
    lease.close()


def test_an_emptied_redis_gets_the_lease_and_all_reports_again(
    own_conductor: Conductor, own_redis: RedisServer, take: Take
) -> None:
    lease = take(own_conductor, own_redis)
    lease.grants(10)
    own_conductor.pause()
    lease.report(StatusDetail(text="before"))
    assert lease.reporter.flush(5)
    own_redis.restart(empty=True)
    assert own_conductor.redis.dbsize() == 0
    lease.report(StatusDetail(text="during"))
    time.sleep(0.5)
    own_conductor.load_functions()
    own_conductor.paused.clear()
    wait_for(
        lambda: own_conductor.lease(lease.execution_id).get("token") == lease.token,
        what="the lease",
    )
    wait_for(
        lambda: {"before", "during"} <= set(details(own_conductor, lease)),
        what="the reports",
        seconds=15,
    )
    assert not lease.lost.is_set()
    lease.close()


def test_grants_that_were_lost_with_redis_are_asked_for_again(
    own_conductor: Conductor, own_redis: RedisServer, take: Take
) -> None:
    own_conductor.pause()
    lease = take(own_conductor, own_redis)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(lease.grants(30)))
    thread.start()
    lease.reporter.flush(5)
    own_redis.restart(empty=True)
    own_conductor.load_functions()
    own_conductor.paused.clear()
    thread.join(20)
    assert answers
    lease.close()


def test_a_lease_outlives_its_time_while_the_agent_renews_it(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    lease = take(conductor, redis_server)
    lease.phase = "running"
    time.sleep(LEASE_SECONDS * 1.5)
    assert conductor.lease(lease.execution_id)["phase"] == "running"
    lease.close()
    wait_for(
        lambda: not conductor.lease(lease.execution_id), seconds=LEASE_SECONDS + 2, what="expiry"
    )


def test_a_fenced_attempt_falls_silent(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    lease = take(conductor, redis_server)
    lost = threading.Event()
    lease.on_lost = lost.set
    lease.grants(10)
    key = conductor.keys.lease(GROUP, lease.execution_id)
    conductor.redis.hset(key, mapping={"token": "another", "attempt": "2"})
    assert lost.wait(5)
    lease.report(Finished(outcome=Outcome.complete))
    assert not lease.reporter.flush(0.5) or conductor.applied(lease.execution_id).finished is None
    assert conductor.redis.xlen(conductor.keys.reports(GROUP)) == 0
    lease.close()


def test_an_expired_lease_of_a_requeued_job_is_lost_not_restored(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    lease = take(conductor, redis_server)
    conductor.redis.hset(conductor.keys.job(GROUP, lease.execution_id), "attempt", "2")
    conductor.redis.delete(conductor.keys.lease(GROUP, lease.execution_id))
    assert lease.lost.wait(5)
    lease.close()


def test_grants_are_unreadable_in_redis_and_gone_once_read(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    conductor.secrets = {"PASSWORD": "correct horse battery"}
    lease = take(conductor, redis_server, start=False)
    lease.start(Leased(runtime="process"))
    key = conductor.keys.grant(GROUP, lease.execution_id)
    wait_for(lambda: conductor.redis.exists(key), what="the sealed grant")
    assert b"correct horse" not in b"".join(f[b"g"] for _, f in conductor.redis.xrange(key))
    assert lease.grants(10).secrets == {"PASSWORD": "correct horse battery"}
    assert not conductor.redis.exists(key)
    lease.close()


def test_concurrent_requests_get_their_own_answers(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    conductor.refuse = lambda request: "no space" if request.name == "refused" else None
    lease = take(conductor, redis_server)
    answers: dict[int, set[str]] = {}

    def ask(number: int) -> None:
        names = [f"{number}-{n}" for n in range(5)]
        requests = [GrantRequest(id=name, kind="output", name=name) for name in names]
        answers[number] = set(lease.request_grants(requests, 15).uploads)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    refused = lease.request_grants([GrantRequest(id="r", kind="output", name="refused")], 15)
    for thread in threads:
        thread.join()
    assert refused.refused == {"r": "no space"}
    assert answers == {number: {f"{number}-{n}" for n in range(5)} for number in range(6)}
    lease.close()


def test_waiting_for_a_silent_control_plane_ends_in_words(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    conductor.pause()
    lease = take(conductor, redis_server)
    with pytest.raises(NoGrants, match="doctor"):
        lease.grants(0.5)
    lease.close()


def test_live_lines_survive_an_outage_with_a_gap_marker(
    own_conductor: Conductor, own_redis: RedisServer, take: Take
) -> None:
    lease = take(own_conductor, own_redis)
    own_redis.kill()
    lines = [LogLine(s=LogStream.stdout, t="t", m=f"line {n}", o=n, e=n + 1) for n in range(8000)]
    lease.live_log.put(lines)
    own_redis.start()
    wait_for(
        lambda: own_conductor.live_lines(lease.execution_id)[-1:] == [("stdout", "line 7999")],
        what="the last line",
    )
    entries = own_conductor.redis.xrange(own_conductor.keys.log(GROUP, lease.execution_id, 1))
    gaps = [int(fields[b"g"]) for _, fields in entries if b"g" in fields]
    shown = len(entries) - len(gaps)
    assert sum(gaps) + shown == 8000
    assert (
        0 < own_conductor.redis.ttl(own_conductor.keys.log(GROUP, lease.execution_id, 1)) <= 86400
    )
    lease.close()


def test_m03_the_live_stream_stays_bounded(
    conductor: Conductor, redis_server: RedisServer, take: Take
) -> None:
    lease = take(conductor, redis_server)
    for start in range(0, 20_000, 500):
        lease.live_log.put(
            [LogLine(s=LogStream.stdout, t="t", m=f"{n}") for n in range(start, start + 500)]
        )
        time.sleep(0.01)
    lease.live_log.close()
    length = conductor.redis.xlen(conductor.keys.log(GROUP, lease.execution_id, 1))
    assert length < 6500
    assert conductor.live_lines(lease.execution_id)[-1] == ("stdout", "19999")
    lease.close()
