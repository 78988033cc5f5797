"""Watches one running command: limits, stop requests, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from valohai_agent.clock import Clock
from valohai_agent.runtimes.base import ExitStatus, Running
from valohai_agent.stopping import Cause, Limits, Patience, SignalName, StopSequence

POLL_SECONDS = 0.2  # how late a stop request or a limit is noticed
TICK_SECONDS = 1.0


class Supervisor:
    """Runs `watch` in the job's thread; `stop` and `kill` may be called from any other, also before it begins.

    `on_limit(cause)` is told when a limit is reached, `on_signal(name, cause)` after a signal was sent, `tick` about
    once a second. `last_output_at` gives the monotonic time of the last output.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        limits: Limits,
        patience: Patience,
        last_output_at: Callable[[], float],
        on_limit: Callable[[Cause], None],
        on_signal: Callable[[SignalName, Cause], None],
        tick: Callable[[], None],
    ) -> None:
        self._clock, self._limits = clock, limits
        self._last_output_at = last_output_at
        self._on_limit, self._on_signal, self._tick = on_limit, on_signal, tick
        self._sequence = StopSequence(patience)
        self._lock = threading.Lock()
        self._ticked_at = 0.0

    @property
    def cause(self) -> Cause | None:
        return self._sequence.cause

    def stop(self, cause: Cause, patience: Patience | None = None) -> None:
        """`patience`: another one than usual, for this stop."""
        with self._lock:
            self._sequence.begin(cause, self._clock.monotonic(), patience)

    def kill(self, cause: Cause) -> None:
        with self._lock:
            self._sequence.kill(cause, self._clock.monotonic())

    def watch(self, running: Running) -> ExitStatus:
        """Waits for the end of the command and brings it about when there is reason to."""
        started_at = self._clock.monotonic()
        while True:
            status = running.wait(POLL_SECONDS)
            if status is not None:
                return status
            now = self._clock.monotonic()
            self._tick_at(now)
            self._apply_limits(started_at, now)
            self._send_due_signals(running, now)
            if self._sequence.hopeless(now):
                running.remove()
                return ExitStatus(
                    code=137, message="the command did not end after SIGKILL and was abandoned"
                )

    def _tick_at(self, now: float) -> None:
        if now - self._ticked_at >= TICK_SECONDS:
            self._ticked_at = now
            self._tick()

    def _apply_limits(self, started_at: float, now: float) -> None:
        if self._sequence.cause is not None:
            return
        cause = self._limits.exceeded(
            started_at=started_at, last_output_at=self._last_output_at(), now=now
        )
        if cause is not None:
            self._on_limit(cause)
            self.stop(cause)

    def _send_due_signals(self, running: Running, now: float) -> None:
        while True:
            with self._lock:
                name, cause = self._sequence.due(now), self._sequence.cause
            if name is None or cause is None:
                return
            running.signal(name)
            self._on_signal(name, cause)
