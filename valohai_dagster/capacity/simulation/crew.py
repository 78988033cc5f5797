"""The queue and the workers of a simulated group, after PROTOCOL's rules of leases.

A worker takes a job as soon as it has a slot and is not draining. One that is cut off goes on computing: its job is given
to another when its lease has been lost for the grace, or as soon as its machine is known to be gone, and its own result
does not count after that.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from valohai_dagster.capacity.model import Seat
from valohai_dagster.capacity.simulation.scenario import Work, at
from valohai_dagster.capacity.simulation.timeline import Timeline

HEARTBEAT_LIFE = 30.0  # seconds until a silent worker leaves the roster
LOST_GRACE = 300.0  # seconds more until its job is another's


@dataclass
class Job:
    """`lease` counts up with each worker that gets it; a result under an older one does not count."""

    number: int
    work: Work
    worker: Worker | None = None
    lease: int = 0
    started_at: float | None = None
    finished_at: float | None = None


@dataclass
class Worker:
    name: str
    machine: str
    slots: int
    jobs: dict[int, int] = field(
        default_factory=dict
    )  # that it computes, by lease; also those of others by now
    draining: bool = False
    alive: bool = True
    cut_off: bool = False
    heard_at: float = 0.0  # while it is cut off or dead: when it was heard last
    idle_since: float = 0.0
    results: list[tuple[Job, int]] = field(default_factory=list)  # that it could not report


class Crew:
    """`changed` is called whenever the conductor would hear of it at once."""

    def __init__(self, timeline: Timeline, changed: Callable[[], None]) -> None:
        self.timeline, self._changed = timeline, changed
        self.jobs: list[Job] = []
        self.workers: dict[str, Worker] = {}
        self._queue: list[tuple[int, int, int, int]] = []  # class, priority, sequence, job
        self._sealed: set[str] = set()  # machines whose workers get no work
        self.dark_until = 0.0  # nobody hears anybody
        self.doubled = 0  # jobs that were given away while their worker computed on

    # -- jobs --------------------------------------------------------------------------------------------------

    def arrive(self, work: Work) -> None:
        job = Job(number=len(self.jobs), work=work)
        self.jobs.append(job)
        self._enqueue(job, front=False)

    @property
    def finished(self) -> bool:
        return all(job.finished_at is not None for job in self.jobs)

    def waiting(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for _, priority, _, _ in self._queue:
            counts[-priority] = counts.get(-priority, 0) + 1
        return counts

    def holds_work(self, worker: Worker) -> int:
        """How many jobs are its own, as far as anybody else knows."""
        return sum(self._owns(worker, number) for number in worker.jobs)

    def _owns(self, worker: Worker, number: int) -> bool:
        job = self.jobs[number]
        return job.worker is worker and job.lease == worker.jobs[number]

    def busy(self, machine: str) -> bool:
        return any(self.holds_work(one) and one.alive for one in self._on(machine))

    def _enqueue(self, job: Job, *, front: bool) -> None:
        entry = (0 if front else 1, -job.work.priority, len(self.jobs) + job.number, job.number)
        heapq.heappush(self._queue, entry)
        self._hand_out()
        self._changed()

    def _hand_out(self) -> None:
        while self._queue:
            free = (
                one
                for one in self.workers.values()
                if self._heard(one)
                and not one.draining
                and len(one.jobs) < one.slots
                and one.machine not in self._sealed
            )
            worker = next(free, None)
            if worker is None:
                return
            self._take(worker, self.jobs[heapq.heappop(self._queue)[-1]])

    def _take(self, worker: Worker, job: Job) -> None:
        job.worker, job.lease = worker, job.lease + 1
        if job.started_at is None:
            job.started_at = self.timeline.seconds
        worker.jobs[job.number] = job.lease
        lease = job.lease
        self.timeline.after(job.work.lasts, lambda: self._computed(worker, job, lease))

    def _computed(self, worker: Worker, job: Job, lease: int) -> None:
        if not worker.alive or worker.jobs.get(job.number) != lease:
            return
        if worker.cut_off:
            worker.results.append((job, lease))
            return
        self._report(worker, job, lease)
        self._freed(worker)

    def _report(self, worker: Worker, job: Job, lease: int) -> None:
        if job.worker is worker and job.lease == lease:
            job.worker, job.finished_at = None, self.timeline.seconds
        worker.jobs.pop(job.number, None)

    def _freed(self, worker: Worker) -> None:
        if not worker.jobs:
            worker.idle_since = self.timeline.seconds
            if worker.draining:
                self._leave(worker)
        self._hand_out()
        self._changed()

    def _lose(self, worker: Worker, *, unless_heard: float | None = None) -> None:
        """Its jobs are given to others. `unless_heard`: not if it was heard after that."""
        if unless_heard is not None and self.timeline.seconds < self.dark_until + LOST_GRACE:
            late = self.dark_until + LOST_GRACE
            self.timeline.plan(late, lambda: self._lose(worker, unless_heard=unless_heard))
            return
        back = not worker.cut_off and worker.alive
        if unless_heard is not None and (back or worker.heard_at > unless_heard):
            return
        for number in sorted(worker.jobs):
            job = self.jobs[number]
            if self._owns(worker, number):
                self.doubled += worker.alive
                job.worker = None
                self._enqueue(job, front=True)

    # -- workers -----------------------------------------------------------------------------------------------

    def check_in(self, worker: Worker) -> None:
        worker.idle_since = self.timeline.seconds
        self.workers[worker.name] = worker
        self._hand_out()
        self._changed()

    def drain(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            return
        if worker.cut_off:  # it hears when it is back
            self.timeline.after(10, lambda: self.drain(name))
            return
        worker.draining = True
        if not worker.jobs:
            self._leave(worker)
        self._changed()

    def cut_off(self, worker: Worker, seconds: float) -> None:
        if worker.cut_off or not worker.alive:
            return
        worker.cut_off, worker.heard_at = True, self.timeline.seconds
        self._wait_for(worker)
        self.timeline.after(seconds, lambda: self._back(worker))

    def darken(self, seconds: float) -> None:
        """The broker is away for so long; agents try again every few seconds."""
        self.dark_until = self.timeline.seconds + seconds
        for number, worker in enumerate(list(self.workers.values())):
            self.cut_off(worker, seconds + number % 5)

    def die(self, worker: Worker) -> None:
        """The agent ends without a word; its jobs end with it."""
        if not worker.alive:
            return
        worker.alive = False
        if not worker.cut_off:
            worker.heard_at = self.timeline.seconds
        self._wait_for(worker)

    def die_on(self, machine: str) -> None:
        for worker in self._on(machine):
            self.die(worker)

    def told_dead(self, machine: str) -> None:
        """PROTOCOL: a machine that is surely gone has its jobs given to others at once."""
        for worker in list(self._on(machine)):
            self._lose(worker)

    def seal(self, machine: str) -> bool:
        """As the real one: by the roster, and in one step with the taking of jobs; and by the records."""
        if any(
            (self._heard(one) and not one.draining) or self.holds_work(one)
            for one in self._on(machine)
        ):
            return False
        self._sealed.add(machine)
        return True

    def unseal(self, machine: str) -> None:
        self._sealed.discard(machine)

    def on(self, machine: str) -> list[Worker]:
        return list(self._on(machine))

    def _on(self, machine: str) -> Iterator[Worker]:
        return (one for one in self.workers.values() if one.machine == machine)

    def _wait_for(self, worker: Worker) -> None:
        heard = worker.heard_at
        self.timeline.plan(heard + HEARTBEAT_LIFE, self._changed)
        late = heard + HEARTBEAT_LIFE + LOST_GRACE
        self.timeline.plan(late, lambda: self._lose(worker, unless_heard=heard))

    def _back(self, worker: Worker) -> None:
        if not worker.alive:
            return
        if self.timeline.seconds < self.dark_until:
            self.timeline.plan(self.dark_until, lambda: self._back(worker))
            return
        worker.cut_off = False
        for job, lease in worker.results:
            self._report(worker, job, lease)
        worker.jobs = {
            number: lease for number, lease in worker.jobs.items() if self._owns(worker, number)
        }
        worker.results = []
        self._freed(worker)

    def _leave(self, worker: Worker) -> None:
        worker.alive = False
        self.workers.pop(worker.name, None)

    # -- what the conductor knows ------------------------------------------------------------------------------

    def seats(self) -> tuple[Seat, ...]:
        """Those in the roster, and those that are silent but whose work is not yet another's."""
        now = self.timeline.seconds
        return tuple(
            self._seat(worker, now)
            for worker in self.workers.values()
            if self._heard(worker)
            or now - worker.heard_at < HEARTBEAT_LIFE
            or self.holds_work(worker)
        )

    def _heard(self, worker: Worker) -> bool:
        return worker.alive and not worker.cut_off

    def _seat(self, worker: Worker, now: float) -> Seat:
        busy = self.holds_work(worker)
        return Seat(
            worker=worker.name,
            machine_id=worker.machine,
            slots=worker.slots,
            busy=busy,
            draining=worker.draining,
            idle_since=None if busy else at(worker.idle_since),
            seen_at=at(now if self._heard(worker) else worker.heard_at),
        )
