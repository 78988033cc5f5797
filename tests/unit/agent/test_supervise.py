"""A command under supervision, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.clock import FakeClock
from valohai_agent.protocol import Usage
from valohai_agent.runtimes.base import Elsewhere, Entry, ExitStatus, SignalName
from valohai_agent.stopping import Cause, Limits, Patience
from valohai_agent.supervise import Supervisor


class FakeRunning:
    """Ends by itself at `ends_at`, or by one of the signals in `obeys`; waiting moves the clock."""

    id = "42"

    def __init__(
        self,
        clock: FakeClock,
        *,
        ends_at: float = 1e9,
        obeys: tuple[str, ...] = ("SIGINT",),
        during: dict[float, Callable[[], None]] | None = None,
    ) -> None:
        self._clock, self._ends_at, self._obeys = clock, ends_at, obeys
        self._during = sorted((during or {}).items())
        self._ended: ExitStatus | None = None
        self.signals: list[tuple[float, str]] = []
        self.removed = False

    def wait(self, timeout: float | None = None) -> ExitStatus | None:
        self._clock.advance(timeout or 0)
        now = self._clock.monotonic()
        while self._during and self._during[0][0] <= now:
            self._during.pop(0)[1]()
        if self._ended is None and now >= self._ends_at:
            self._ended = ExitStatus(code=0)
        return self._ended

    def signal(self, name: SignalName) -> None:
        self.signals.append((round(self._clock.monotonic()), name))
        if name in self._obeys:
            self._ended = ExitStatus(code=130)

    def usage(self) -> Usage:
        return Usage()

    own_network = False

    def enter(self, argv: Sequence[str], *, terminal: str | None = None) -> Entry:
        return Entry(argv=argv, environment={})

    def copy_out(self, path: str, target: Path) -> Elsewhere | str | None:
        return "which does not exist"

    def remove(self) -> None:
        self.removed = True


class Watched:
    """A supervisor with its surroundings recorded."""

    def __init__(self, clock: FakeClock, limits: Limits | None = None) -> None:
        self.limits_reached: list[Cause] = []
        self.acknowledged: list[tuple[str, Cause]] = []
        self.ticks = 0
        self.last_output_at = 0.0
        self.supervisor = Supervisor(
            clock,
            limits=limits or Limits(),
            patience=Patience(),
            last_output_at=lambda: self.last_output_at,
            on_limit=self.limits_reached.append,
            on_signal=lambda name, cause: self.acknowledged.append((name, cause)),
            tick=self._tick,
        )

    def _tick(self) -> None:
        self.ticks += 1


def test_a_command_that_ends_by_itself_gets_no_signal(clock: FakeClock) -> None:
    watched, running = Watched(clock), FakeRunning(clock, ends_at=5)
    assert watched.supervisor.watch(running) == ExitStatus(code=0)
    assert running.signals == []
    assert 4 <= watched.ticks <= 6


def test_m30_the_time_limit_interrupts_the_command(clock: FakeClock) -> None:
    watched = Watched(clock, Limits(time_limit_seconds=30))
    running = FakeRunning(clock)
    assert watched.supervisor.watch(running).code == 130
    assert watched.limits_reached == [Cause.time_limit]
    assert running.signals == [(30, "SIGINT")]
    assert watched.supervisor.cause is Cause.time_limit


def test_k54_a_command_that_ignores_everything_is_killed_after_90_seconds(clock: FakeClock) -> None:
    watched = Watched(clock)
    running = FakeRunning(
        clock, obeys=("SIGKILL",), during={10: lambda: watched.supervisor.stop(Cause.user)}
    )
    watched.supervisor.watch(running)
    assert running.signals == [(10, "SIGINT"), (70, "SIGTERM"), (100, "SIGKILL")]
    assert [name for name, _ in watched.acknowledged] == ["SIGINT", "SIGTERM", "SIGKILL"]


def test_k54_a_hard_stop_during_the_soft_one_kills_at_once(clock: FakeClock) -> None:
    watched = Watched(clock)
    running = FakeRunning(
        clock,
        obeys=("SIGKILL",),
        during={
            10: lambda: watched.supervisor.stop(Cause.user),
            20: lambda: watched.supervisor.kill(Cause.user),
        },
    )
    watched.supervisor.watch(running)
    assert running.signals == [(10, "SIGINT"), (20, "SIGKILL")]


def test_a_stop_that_came_before_the_start_is_applied_at_once(clock: FakeClock) -> None:
    watched, running = Watched(clock), FakeRunning(clock)
    watched.supervisor.stop(Cause.user)
    watched.supervisor.watch(running)
    assert running.signals[0][1] == "SIGINT"
    assert clock.monotonic() < 1


def test_a_process_that_survives_sigkill_is_abandoned(clock: FakeClock) -> None:
    watched, running = Watched(clock), FakeRunning(clock, obeys=())
    watched.supervisor.kill(Cause.user)
    status = watched.supervisor.watch(running)
    assert running.removed
    assert status.code == 137
    assert "abandoned" in (status.message or "")


def test_m31_output_keeps_the_command_alive_until_it_falls_silent(clock: FakeClock) -> None:
    watched = Watched(clock, Limits(no_output_timeout_seconds=20))

    def print_something() -> None:
        watched.last_output_at = clock.monotonic()

    running = FakeRunning(clock, during={15: print_something})
    watched.supervisor.watch(running)
    assert watched.limits_reached == [Cause.silence]
    assert running.signals == [(35, "SIGINT")]


def test_a_limit_during_a_stop_changes_nothing(clock: FakeClock) -> None:
    watched = Watched(clock, Limits(time_limit_seconds=20))
    running = FakeRunning(
        clock, obeys=("SIGTERM",), during={10: lambda: watched.supervisor.stop(Cause.user)}
    )
    watched.supervisor.watch(running)
    assert watched.supervisor.cause is Cause.user
    assert watched.limits_reached == []
