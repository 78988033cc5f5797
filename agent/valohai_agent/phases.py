"""Separate spans of one attempt, so that waiting, pulling and computing are never mixed up (decision 9)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from valohai_agent.clock import Clock
from valohai_agent.protocol import Phase, PhaseChanged, PhaseSpan


class PhaseClock:
    """Remembers when each phase began and ended, and tells `changed` and `progress` about it."""

    def __init__(
        self,
        clock: Clock,
        *,
        changed: Callable[[PhaseChanged], None],
        progress: Callable[[PhaseChanged], None],
    ) -> None:
        self._clock, self._changed, self._progress = clock, changed, progress
        self._spans: list[PhaseSpan] = []
        self._current: tuple[Phase, datetime] | None = None

    @property
    def current(self) -> Phase | None:
        return self._current[0] if self._current else None

    def enter(self, phase: Phase, message: str | None = None) -> None:
        """Ends the phase before, if it still runs, and begins this one at the same moment."""
        now = self._clock.now()
        self._end(now)
        self._current = (phase, now)
        self._changed(PhaseChanged(phase=phase, message=message))

    def pause(self) -> None:
        """Ends the phase without beginning another: starting a container is nobody's span."""
        self._end(self._clock.now())

    def move(self, done: int | None, total: int | None, message: str | None = None) -> None:
        """Progress within the phase; whoever passes it on limits how often."""
        if self._current is not None:
            phase = self._current[0]
            text = message or progress_words(phase, done or 0, total)
            self._progress(PhaseChanged(phase=phase, message=text, done=done or 0, total=total))

    def finish(self) -> list[PhaseSpan]:
        """Ends the last phase; gives all spans in order."""
        self._end(self._clock.now())
        return list(self._spans)

    def _end(self, now: datetime) -> None:
        if self._current is not None:
            phase, started_at = self._current
            self._spans.append(PhaseSpan(phase=phase.value, started_at=started_at, ended_at=now))
            self._current = None


def progress_words(phase: Phase, done: int, total: int | None) -> str:
    """`downloading 63 %`, or the bytes while the end is unknown."""
    if total:
        return f"{phase.value} {min(100, done * 100 // total)} %"
    return f"{phase.value} {done:,} bytes"
