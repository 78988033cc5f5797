"""A worker that plays what a test has written down: outcomes are exact and take no time.

It takes whatever is to be had, several jobs at once, and speaks the real protocol (see `sim_agent`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from tests.support.sim_agent import SimAgent, SimLease
from valohai_agent import protocol as p

POLL_SECONDS = 0.02
HEARTBEAT_SECONDS = 5.0
SLOTS = 16
CACHED = 300  # marks of contents


@dataclass(frozen=True, kw_only=True)
class Play:
    """How one execution goes. By default its command ends well and leaves one file."""

    outputs: Mapping[str, bytes] = field(default_factory=lambda: {"part.csv": b"a,b\n"})
    sidecars: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by output
    metadata: Sequence[Mapping[str, Any]] = ()
    phases: Sequence[p.Phase] = ()  # before `running`, each with some progress
    retried: Sequence[str] = ()  # what is told of further tries of a download
    outcome: p.Outcome = p.Outcome.complete
    exit_code: int | None = 0
    reason: str | None = None
    stderr: str = ""
    until_stopped: bool = False  # runs until somebody stops it
    until: threading.Event | None = None  # runs until the test says so
    versions: Mapping[str, str] | None = None  # URI of an input file -> what its source called it
    while_running: Callable[[p.Job], None] | None = None  # called once the command runs
    preempted: bool = False  # cut short, since the machine goes away

    @classmethod
    def reclaimed(cls, outputs: Mapping[str, bytes], **values: Any) -> Play:
        """What was stored before the machine went away."""
        reason = "AWS reclaims this spot machine (terminate)"
        ended = {"outcome": p.Outcome.error, "exit_code": 130, "reason": reason}
        return cls(outputs=outputs, preempted=True, **ended, **values)

    @classmethod
    def failing(cls, exit_code: int = 3, *, stderr: str = "") -> Play:
        return cls(
            outputs={},
            outcome=p.Outcome.error,
            exit_code=exit_code,
            reason=f"the command failed with exit code {exit_code}",
            stderr=stderr,
        )

    @classmethod
    def endless(cls, while_running: Callable[[p.Job], None] | None = None) -> Play:
        return cls(outputs={}, until_stopped=True, while_running=while_running)


Plays = Mapping[str, "Play | Sequence[Play]"]  # by step; a sequence is for the tries of a run


class SimWorker:
    """One thread takes, one thread per job plays. `problems` holds what went wrong in them."""

    def __init__(self, client: redis.Redis, keys: p.Keys, plays: Plays, *, group: str) -> None:
        self.agent = SimAgent(client, keys, group=group, name="sim-1")
        self.plays: dict[str, Play | Sequence[Play]] = dict(plays)  # a test may change them
        self.taken: list[p.Job] = []
        self.problems: list[BaseException] = []
        self._tries: Counter[tuple[str | None, str]] = Counter()
        self._cached: tuple[str, ...] = ()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> SimWorker:
        self._spawn(self._take_all)
        self._spawn(self._stay_alive)
        return self

    def stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(10)

    def _spawn(self, target: Callable[..., None], *args: Any) -> None:
        def guarded() -> None:
            try:
                target(*args)
            except (AssertionError, redis.RedisError, OSError, ValueError, KeyError) as error:
                if not self._ending.is_set():
                    self.problems.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stay_alive(self) -> None:
        while not self._ending.is_set():
            self.agent.heartbeat(slots=str(SLOTS), cached=",".join(self._cached))
            self._ending.wait(HEARTBEAT_SECONDS)

    def _take_all(self) -> None:
        while not self._ending.is_set():
            lease = self.agent.try_take()
            if lease is None:
                self._ending.wait(POLL_SECONDS)
                continue
            self.taken.append(lease.job)
            self._keep_inputs(lease.job)
            self._spawn(self._play, lease, self._play_of(lease.job))

    def _keep_inputs(self, job: p.Job) -> None:
        """As an agent's cache would; the queue is told with the next heartbeat."""
        files = [file for item in job.inputs if item.download == "always" for file in item.files]
        names = [file.content_name for file in files if file.content_name]
        marks = dict.fromkeys(p.content_mark(name) for name in names)
        self._cached = (*marks, *(mark for mark in self._cached if mark not in marks))[:CACHED]

    def _play_of(self, job: p.Job) -> Play:
        key = (job.run_id, job.step)
        nth = self._tries[key]
        self._tries[key] += 1
        found = self.plays.get(job.step, Play())
        return found if isinstance(found, Play) else found[min(nth, len(found) - 1)]

    def _play(self, lease: SimLease, play: Play) -> None:
        lease.leased()
        lease.wait_grants()
        for phase in play.phases:
            lease.report(p.PhaseChanged(phase=phase))
            for done in range(0, 101, 25):
                text = f"{phase.value} {done} %"
                lease.report(p.PhaseChanged(phase=phase, message=text, done=done, total=100))
        for text in play.retried:
            lease.report(p.PhaseChanged(phase=p.Phase.downloading, message=text))
        if play.versions is not None:
            _tell_inputs(lease, play.versions)
        lease.report(p.PhaseChanged(phase=p.Phase.running))
        for event in play.metadata:
            lease.report(p.MetadataEvents(events=[dict(event)]))
        if play.while_running is not None:
            play.while_running(lease.job)
        if play.until is not None:
            self._wait(lease, play.until.is_set)
        if play.until_stopped:
            self._wait(lease, lambda: self._stopped(lease))
            lease.report(p.StopAcknowledged(signal="SIGINT", message="sent SIGINT"))
            lease.finish(p.Outcome.stopped, exit_code=130, reason="stopped on request")
            return
        _end(lease, play)

    def _wait(self, lease: SimLease, done: Callable[[], bool]) -> None:
        while not done() and not self._ending.wait(POLL_SECONDS):
            lease.renew()

    def _stopped(self, lease: SimLease) -> bool:
        return any(
            command.kind in ("stop", "stop-hard") and command.execution_id == lease.job.execution_id
            for command in self.agent.commands()
        )


def _end(lease: SimLease, play: Play) -> None:
    for name, content in play.outputs.items():
        lease.store(name, content, **play.sidecars.get(name, {}))
    logs = [lease.store_log("stderr", play.stderr.encode())] if play.stderr else []
    values: dict[str, Any] = {"exit_code": play.exit_code, "reason": play.reason, "logs": logs}
    if play.preempted:
        lease.report(p.Preempted(seconds_left=100.0, what=str(play.reason)))
        values |= {"preempted": True, "phases": [_span(p.Phase.running)]}
    lease.finish(play.outcome, **values)


def _span(phase: p.Phase) -> p.PhaseSpan:
    now = p.utcnow()
    return p.PhaseSpan(phase=phase.value, started_at=now, ended_at=now)


def _tell_inputs(lease: SimLease, versions: Mapping[str, str]) -> None:
    for item in lease.job.inputs:
        for file in item.files:
            ready = p.InputReady(
                input=item.name,
                file_id=file.id,
                name=file.name,
                size=file.size or 0,
                checksums=file.checksums,
                version=versions.get(file.uri),
            )
            lease.report(ready)


@contextlib.contextmanager
def sim_worker(
    client: redis.Redis, keys: p.Keys, plays: Plays, *, group: str = "local"
) -> Iterator[SimWorker]:
    """The running worker; what went wrong in its threads fails the test at the end."""
    worker = SimWorker(client, keys, plays, group=group).start()
    try:
        yield worker
    finally:
        worker.stop()
    assert not worker.problems, worker.problems
