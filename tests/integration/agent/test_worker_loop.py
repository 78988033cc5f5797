"""The loop around jobs: slots, drain, commands, outages. Jobs are stand-ins that end when the test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.agent_conductor import GROUP, Conductor
from tests.support.agent_sessions import OpenSession
from tests.support.ports import wait_for
from tests.support.redis_server import RedisServer
from valohai_agent.lease import Lease
from valohai_agent.preemption import Notice
from valohai_agent.protocol import Finished, Leased, Outcome
from valohai_agent.session import Session
from valohai_agent.stopping import Cause
from valohai_agent.worker import LoopOptions, WorkerLoop


class HeldRun:
    """Leases, then waits for `release` or a stop."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.release = threading.Event()
        self.calls: list[str] = []
        lease.on_lost = self.release.set

    def run(self) -> None:
        self.lease.start(Leased(runtime="process"))
        self.release.wait(30)
        self.lease.report(Finished(outcome=Outcome.complete))
        self.lease.reporter.flush(10)
        self.lease.close()

    def stop(self, *, hard: bool = False, cause: Cause = Cause.user, reason: str = "") -> None:
        self.calls.append(f"{'hard' if hard else 'soft'} {cause.value}")
        self.release.set()

    def preempt(self, notice: Notice | None) -> None:
        self.calls.append(notice.what if notice else "stays")

    def fence(self) -> None:
        self.calls.append("fence")
        self.lease.fence()

    def upload_now(self) -> None:
        self.calls.append("upload-now")


class Loop:
    """A running loop; leaving the block drains it."""

    def __init__(self, session: Session, **options: object) -> None:
        self.runs: list[HeldRun] = []
        self.session = session
        self.reaped = 0
        self.loop = WorkerLoop(
            session,
            LoopOptions(**options),  # type: ignore[arg-type]
            start_run=self._start,
            reap=self._reap,
        )
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def _start(self, lease: Lease) -> HeldRun:
        self.runs.append(HeldRun(lease))
        return self.runs[-1]

    def _reap(self) -> None:
        self.reaped += 1

    def running(self, count: int) -> list[HeldRun]:
        wait_for(lambda: len(self.runs) >= count, what=f"{count} runs")
        return self.runs

    def end(self) -> None:
        for run in self.runs:
            run.release.set()
        self.loop.drain()
        self.thread.join(10)


@pytest.fixture
def loops() -> Iterator[list[Loop]]:
    started: list[Loop] = []
    yield started
    for loop in started:
        loop.end()


@pytest.fixture
def session(redis_server: RedisServer, conductor: Conductor, open_session: OpenSession) -> Session:
    return open_session(redis_server.unix_url)


def test_a_submitted_job_starts_within_a_fraction_of_a_second(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session)
    loops.append(loop)
    time.sleep(0.3)
    started = time.monotonic()
    conductor.submit("true")
    loop.running(1)
    assert time.monotonic() - started < 0.5


def test_as_many_jobs_as_slots_run_at_once_and_the_next_follows(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session, slots=3)
    loops.append(loop)
    for _ in range(5):
        conductor.submit("true")
    loop.running(3)
    time.sleep(0.3)
    assert len(loop.runs) == 3
    assert conductor.worker("w1")["busy"] == "3"
    loop.runs[0].release.set()
    loop.running(4)
    conductor.finished(loop.runs[0].lease.execution_id)


def test_drain_finishes_what_runs_and_takes_nothing_more(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session)
    loops.append(loop)
    first = conductor.submit("true")
    loop.running(1)
    conductor.command("w1", kind="drain")
    wait_for(lambda: conductor.worker("w1")["state"] == "draining", what="the draining state")
    second = conductor.submit("true")
    assert loop.thread.is_alive()
    loop.runs[0].release.set()
    loop.thread.join(5)
    assert not loop.thread.is_alive()
    conductor.finished(first)
    assert conductor.redis.zscore(conductor.keys.ready(GROUP), second) is not None


def test_an_idle_agent_drains_at_once(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session)
    loops.append(loop)
    time.sleep(0.2)
    started = time.monotonic()
    loop.loop.drain()
    loop.thread.join(5)
    assert time.monotonic() - started < 1


def test_stops_reach_the_run_they_name(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session, slots=2)
    loops.append(loop)
    first, second = conductor.submit("true"), conductor.submit("true")
    runs = {run.lease.execution_id: run for run in loop.running(2)}
    token = runs[first].lease.token
    conductor.command("w1", kind="stop", execution_id=first, token="of an earlier attempt")
    conductor.command("w1", kind="upload-now", execution_id=second)
    conductor.command("w1", kind="stop-hard", execution_id=first, token=token)
    wait_for(lambda: runs[first].calls and runs[second].calls, what="the commands")
    assert runs[first].calls == ["hard user"]
    assert runs[second].calls == ["upload-now"]


def test_a_stop_that_overtakes_the_job_is_kept_for_it(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session)
    loops.append(loop)
    time.sleep(0.2)
    job = conductor.job("true")
    conductor.command("w1", kind="stop", execution_id=job.execution_id)
    time.sleep(0.3)
    conductor.enqueue(job)
    run = loop.running(1)[0]
    wait_for(lambda: run.calls == ["soft user"], what="the early stop")


def test_commands_for_an_earlier_process_of_the_name_are_not_obeyed(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    conductor.command("w1", kind="drain")
    time.sleep(0.01)
    loop = Loop(session)
    loops.append(loop)
    time.sleep(0.5)
    assert loop.thread.is_alive()


def test_a_command_that_cannot_be_read_is_skipped(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session)
    loops.append(loop)
    time.sleep(0.2)
    conductor.redis.xadd(conductor.keys.command(GROUP, "w1"), {"c": "garbage"})
    conductor.command("w1", kind="drain", v=99)
    time.sleep(0.2)
    assert loop.thread.is_alive()
    conductor.command("w1", kind="drain")
    loop.thread.join(5)
    assert not loop.thread.is_alive()


def test_stopping_the_agent_stops_its_jobs_for_that_reason(
    conductor: Conductor, session: Session, loops: list[Loop]
) -> None:
    loop = Loop(session)
    loops.append(loop)
    conductor.submit("true")
    run = loop.running(1)[0]
    loop.loop.stop_jobs()
    wait_for(lambda: run.calls == ["soft shutdown"], what="the stop")


def test_once_ends_after_one_job(conductor: Conductor, session: Session, loops: list[Loop]) -> None:
    loop = Loop(session, once=True)
    loops.append(loop)
    conductor.submit("true")
    conductor.submit("true")
    loop.running(1)[0].release.set()
    loop.thread.join(5)
    assert not loop.thread.is_alive()
    assert len(loop.runs) == 1


def test_an_idle_limit_ends_the_agent(session: Session, loops: list[Loop]) -> None:
    loop = Loop(session, idle_exit_seconds=0.5)
    loops.append(loop)
    loop.thread.join(5)
    assert not loop.thread.is_alive()


def test_the_loop_takes_jobs_again_after_redis_was_emptied(
    own_conductor: Conductor, own_redis: RedisServer, open_session: OpenSession, loops: list[Loop]
) -> None:
    loop = Loop(open_session(own_redis.unix_url), slots=2)
    loops.append(loop)
    own_conductor.submit("true")
    running = loop.running(1)[0]
    own_redis.restart(empty=True, pause_seconds=0.5)
    own_conductor.load_functions()
    own_conductor.submit("true")
    loop.running(2)
    wait_for(lambda: own_conductor.lease(running.lease.execution_id), what="the first lease again")
    assert not running.lease.lost.is_set()


def test_an_agent_frozen_past_its_lease_is_fenced_when_another_took_over(
    conductor: Conductor, redis_server: RedisServer, open_session: OpenSession, loops: list[Loop]
) -> None:
    """The partition case: the second attempt runs, the first one's late reports have no effect."""
    first = Loop(open_session(redis_server.unix_url, "w1"))
    loops.append(first)
    job = conductor.job("true")
    conductor.enqueue(job)
    run = first.running(1)[0]
    conductor.applied(job.execution_id)
    first.loop.drain()
    conductor.requeue(job, 2)
    second = Loop(open_session(redis_server.unix_url, "w2"))
    loops.append(second)
    second.running(1)
    assert second.reaped >= 1, "leftovers of the first attempt are removed before the second begins"
    assert run.lease.lost.wait(5)
    run.lease.report(Finished(outcome=Outcome.complete))
    second.runs[0].release.set()
    conductor.finished(job.execution_id, 2)
    assert conductor.applied(job.execution_id, 1).finished is None
