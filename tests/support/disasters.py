"""A load of runs, disasters while it goes on, and the count of what they broke.

Used by bench/recovery.py at full size and by tests with a few disasters. What is random comes from one seed; the moments
at which processes really stand somewhere do not, so a seed repeats the plan, not the interleaving.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from tests.support.fleet.process import FleetProcess
from tests.support.fleet.profile import Profile
from tests.support.installation import Conductor, Installation
from tests.support.invariants import FINAL, Findings, RunFacts, check
from tests.support.launchpad import Launchpad
from tests.support.mortal_conductor import POINTS, VARIABLE
from tests.support.ports import wait_for
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import load_settings

POOL = "scarce"
POOL_SLOTS = 8
PROJECT_YAML = """\
- step:
    name: alone
    image: python:3.11-slim
    command: python alone.py
- step:
    name: first
    image: python:3.11-slim
    command: python first.py
- step:
    name: second
    image: python:3.11-slim
    command: python second.py
    inputs:
      - name: data
- step:
    name: pooled
    image: python:3.11-slim
    command: python pooled.py
- pipeline:
    name: both
    nodes:
      - {name: one, type: execution, step: first}
      - {name: two, type: execution, step: second}
    edges:
      - [one.output.*, two.input.data]
"""
DEFS = f"""\
from pathlib import Path
from valohai_dagster import load_valohai_project
defs = load_valohai_project(
    Path(__file__).parent / "project", name="load", pool={{"pooled": "{POOL}"}}
)
"""
KINDS = (("alone",), ("alone",), ("first", "second"), ("pooled",))  # of runs, by share
GRACE_SECONDS = 15.0  # after which a silent worker's execution is given to another
MORTAL = ("tests.support.mortal_conductor",)
UNREACHED_SECONDS = 10.0  # without any progress: the point is given up for another
STUCK_SECONDS = 10.0  # the longest wait for progress between two disasters
START_SECONDS = 5.0  # of a conductor
REPORTS = 10  # of one execution
TIDY_SECONDS = 30.0  # for what follows the last end: acknowledgements, keys, slots


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One load and the disasters in it."""

    seed: int
    executions: int = 500
    disasters: int = 20
    seconds: float = 60.0  # longest command; the load should outlive the disasters
    fail_share: float = 0.03
    patience: float = 600.0  # for the load to end after the last disaster


@dataclass(kw_only=True)
class Outcome:
    name: str
    seed: int
    disasters: int
    findings: Findings
    points: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)  # of executions when disaster struck
    seconds: float = 0.0
    fleet: dict[str, object] = field(default_factory=dict)


class Scene:
    """The load and the installation that it runs on."""

    def __init__(
        self, plan: Plan, installation: Installation, pad: Launchpad, fleet: FleetProcess
    ) -> None:
        self.plan, self.installation, self.pad, self.fleet = plan, installation, pad, fleet
        self.random = random.Random(plan.seed)
        self.engine = sa.create_engine(installation.postgres_url, pool_pre_ping=True)
        self.points: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.runs: list[str] = []
        self._background = ThreadPoolExecutor(1)
        self._launching: Future[None] | None = None
        self._closing = threading.Event()

    def close(self) -> None:
        self._closing.set()
        self._background.shutdown()
        self.engine.dispose()

    # -- the load ---------------------------------------------------------------------------------------------------
    def create_runs(self) -> None:
        """As many as make the wanted number of executions, in random order."""
        share = sum(len(steps) for steps in KINDS)
        number = max(1, self.plan.executions // share)
        for steps in KINDS:
            self.runs += self.pad.create(number, steps)
        self.random.shuffle(self.runs)

    def launch(self, *, at_leisure: bool) -> None:
        """All at once, or in the background, so that disasters meet hand-overs as well."""
        if not at_leisure:
            self.pad.hand_over(self.runs)
            return
        half = len(self.runs) // 2
        self.pad.hand_over(self.runs[:half])
        self._launching = self._background.submit(self._launch_slowly, self.runs[half:])

    def _launch_slowly(self, runs: list[str]) -> None:
        for run_id in runs:
            self.pad.hand_over([run_id])
            if self._closing.wait(self.plan.seconds / 2 / len(runs)):
                return

    def wait_for_end(self) -> None:
        """Returns after the plan's patience, whatever has not ended by then."""
        if self._launching is not None:
            self._launching.result()
        deadline = time.monotonic() + self.plan.patience
        while self.unfinished() and time.monotonic() < deadline:
            for conductor in self.installation.conductors:
                assert conductor.alive, f"a conductor ended by itself:\n{conductor.log()}"
            time.sleep(0.5)

    def unfinished(self) -> int:
        query = sa.text(
            "SELECT count(*) FROM runs WHERE run_id = ANY(:ids) AND NOT status = ANY(:final)"
        )
        with self.engine.connect() as connection:
            values = {"ids": self.runs, "final": list(FINAL)}
            return connection.execute(query, values).scalar_one()

    def judge(self) -> Findings:
        """The findings once everything had time to be tidied up."""
        deadline = time.monotonic() + TIDY_SECONDS
        while True:
            found = self._check()
            if found.good or time.monotonic() > deadline:
                return found
            time.sleep(1.0)

    def _check(self) -> Findings:
        deployment = open_deployment()
        with self.installation.redis.client() as broker:
            return check(
                self.engine,
                self.runs,
                expected=self._expected,
                broker=broker,
                deployment=deployment,
            )

    def _expected(self, run: RunFacts) -> str:
        profile = self.profile(self.plan)
        failing = any(profile.fails(execution.id) for execution in run.executions)
        return "FAILURE" if failing else "SUCCESS"

    @staticmethod
    def profile(plan: Plan) -> Profile:
        return Profile(
            seed=plan.seed,
            agents=8,
            slots=max(8, plan.executions * 3 // 5),
            running_seconds=(0.0, plan.seconds),
            fail_share=plan.fail_share,
        )

    # -- disasters --------------------------------------------------------------------------------------------------
    def go_on(self) -> None:
        """Lets the load go on for a while: some reports more, or, one time in four, just a moment."""
        if self.random.random() < 0.25:
            time.sleep(self.random.uniform(0.0, 2.0))
            return
        share = REPORTS * self.plan.executions / self.plan.disasters
        enough = self.reports() + self.random.uniform(0.0, 2.0 * share)
        deadline = time.monotonic() + STUCK_SECONDS
        while self.reports() < enough and time.monotonic() < deadline:
            time.sleep(0.05)

    def reports(self) -> int:
        return self.fleet.stats().get("reports", 0)

    def note(self, what: str) -> None:
        """Disaster strikes: what was going on at this moment."""
        self.points[what] += 1
        self.phases.update(self.fleet.stats()["phases"])

    def kill(self, conductor: Conductor) -> None:
        self.note("any moment")
        conductor.kill()

    def start_mortal(self, conductor: Conductor, point: str, number: int) -> None:
        environment = {VARIABLE: f"{point}:{number}"}
        conductor.start(wait=False, module=MORTAL, environment=environment)

    def dies(self, conductor: Conductor) -> bool:
        """False when nothing has moved for so long that it will not die any more."""
        seen, moved_at = self.reports(), time.monotonic() + START_SECONDS
        while conductor.alive and time.monotonic() < moved_at + UNREACHED_SECONDS:
            time.sleep(0.05)
            if (now := self.reports()) != seen:
                seen, moved_at = now, max(moved_at, time.monotonic())
        assert conductor.alive or conductor.killed, f"it ended otherwise:\n{conductor.log()}"
        return not conductor.alive


Disaster = Callable[[Scene], None]


def open_deployment() -> str:
    records = open_records(load_settings())
    records.close()
    return records.deployment_id


@contextmanager
def scene(plan: Plan, root: Path) -> Iterator[Scene]:
    """Everything up, the runs created, nothing launched, no conductor yet."""
    with ExitStack() as stack:
        settings = {"lost_grace_seconds": GRACE_SECONDS}
        installation = stack.enter_context(
            Installation(root, project=PROJECT_YAML, settings=settings)
        )
        stack.enter_context(installation.entered())
        pad = stack.enter_context(Launchpad(root, defs=DEFS))
        pad.instance.event_log_storage.set_concurrency_slots(POOL, POOL_SLOTS)
        fleet = stack.enter_context(
            FleetProcess(
                installation.redis.unix_url,
                open_deployment(),
                Scene.profile(plan),
                log=root / "fleet.log",
            )
        )
        made = Scene(plan, installation, pad, fleet)
        made.create_runs()
        try:
            yield made
        finally:
            made.close()


def play(name: str, plan: Plan, root: Path, disaster: Disaster) -> Outcome:
    """Plays the disaster in a load, waits for the load's end, and judges."""
    started = time.monotonic()
    with scene(plan, root) as on:
        disaster(on)
        on.wait_for_end()
        findings = on.judge()
        return Outcome(
            name=name,
            seed=plan.seed,
            disasters=on.points.total(),
            findings=findings,
            points=on.points,
            phases=on.phases,
            seconds=time.monotonic() - started,
            fleet=on.fleet.stats(),
        )


# -- the disasters ----------------------------------------------------------------------------------------------------


def killed_and_restarted(on: Scene) -> None:
    """One conductor, killed at random moments, also while it starts."""
    conductor = on.installation.add_conductor()
    on.launch(at_leisure=True)
    for number in range(on.plan.disasters):
        on.go_on()
        on.kill(conductor)
        conductor.start(wait=number % 4 != 3)
    wait_for(conductor.serves, seconds=60, what="the last conductor")


def killed_with_a_stand_by(on: Scene) -> None:
    """Two conductors; the one that is killed comes back only when the other one has taken over."""
    pair = [on.installation.add_conductor(), on.installation.add_conductor()]
    on.launch(at_leisure=True)
    for _ in range(on.plan.disasters):
        on.go_on()
        victim = on.random.choice(pair)
        on.kill(victim)
        time.sleep(on.random.choice((0.0, 1.0, TAKE_OVER_SECONDS)))
        victim.start()


TAKE_OVER_SECONDS = 17.0  # a little longer than a lease of a shard lives


def killed_between_commits(on: Scene, points: Collection[str] = tuple(POINTS)) -> None:
    """The conductor dies at a chosen point of its writing, again and again."""
    conductor = on.installation.add_conductor(start=False)
    on.launch(at_leisure=True)
    share = on.plan.executions / on.plan.disasters
    names: list[str] = []
    while on.points.total() < on.plan.disasters and on.unfinished():
        names = names or on.random.sample(list(points), len(points))
        point = names.pop()
        most = max(1, int(share * POINTS[point]))
        on.start_mortal(conductor, point, on.random.randint(1, most))
        if on.dies(conductor):
            on.note(point)
        else:
            conductor.kill()
    conductor.start()


def redis_restarted(on: Scene) -> None:
    _redis(on, empty=False)


def redis_emptied(on: Scene) -> None:
    _redis(on, empty=True)


def _redis(on: Scene, *, empty: bool) -> None:
    on.installation.add_conductor()
    on.launch(at_leisure=False)
    for _ in range(on.plan.disasters):
        on.go_on()
        on.note("emptied" if empty else "restarted")
        on.installation.redis.restart(empty=empty, pause_seconds=on.random.uniform(0.0, 2.0))


def postgres_stopped(on: Scene) -> None:
    on.installation.add_conductor()
    on.launch(at_leisure=False)
    for _ in range(on.plan.disasters):
        on.go_on()
        on.note("stopped")
        on.installation.postgres.halt()
        time.sleep(on.random.uniform(0.5, 6.0))
        on.installation.postgres.resume()


DISASTERS: dict[str, Disaster] = {
    "kill -9, restart": killed_and_restarted,
    "kill -9, second conductor": killed_with_a_stand_by,
    "kill -9 between commits": killed_between_commits,
    "Redis restarted": redis_restarted,
    "Redis emptied": redis_emptied,
    "Postgres stopped": postgres_stopped,
}
