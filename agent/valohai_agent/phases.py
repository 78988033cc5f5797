"""Separate spans of one attempt, so that waiting, pulling and computing are never mixed up (decision 9)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from valohai_agent.checksums import decimal_size
from valohai_agent.clock import Clock
from valohai_agent.protocol import Phase, PhaseChanged, PhaseSpan, Transfer

RATE_WINDOW = timedelta(seconds=10)  # the rate is that of the last so many seconds
RATE_STEP = timedelta(seconds=0.5)  # between two remembered points
LOG_EVERY = timedelta(seconds=15)  # lines about progress in the log
SAY_EVERY = timedelta(seconds=5)  # lines about what is tried again
TELL_EVERY = timedelta(seconds=30)  # of these that are events of the run
SHOWN_SERVERS = 3
MOVING = frozenset({Phase.downloading, Phase.uploading})


class PhaseClock:
    """Remembers when each phase began and ended, and tells `changed` and `progress` about it.

    `log` gets a line now and then while a phase moves many bytes.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        changed: Callable[[PhaseChanged], None],
        progress: Callable[[PhaseChanged], None],
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._clock, self._changed, self._progress, self._log = clock, changed, progress, log
        self._lock = threading.Lock()
        self._spans: list[PhaseSpan] = []
        self._current: tuple[Phase, datetime] | None = None
        self._rate = Rate()
        self._logged_at: datetime | None = None
        self._said_at: datetime | None = None
        self._told_at: datetime | None = None
        self._moved: tuple[int | None, int | None] = (None, None)

    @property
    def current(self) -> Phase | None:
        return self._current[0] if self._current else None

    def enter(self, phase: Phase, message: str | None = None) -> None:
        """Ends the phase before, if it still runs, and begins this one at the same moment."""
        now = self._clock.now()
        self._end(now)
        self._current = (phase, now)
        self._rate, self._logged_at, self._moved = Rate(), now, (None, None)
        self._changed(PhaseChanged(phase=phase, message=message))

    def pause(self) -> None:
        """Ends the phase without beginning another: starting a container is nobody's span."""
        self._end(self._clock.now())

    def move(self, done: int | None, total: int | None, message: str | None = None) -> None:
        """Progress within the phase, from any thread; whoever passes it on limits how often."""
        if self._current is None:
            return
        phase, now = self._current[0], self._clock.now()
        text = message
        with self._lock:
            if text is None:
                rate = self._rate.at(now, done or 0)
                text = progress_words(phase, done or 0, total, rate)
            self._moved = (done or 0, total)
            due = self._logged_at is not None and now - self._logged_at >= LOG_EVERY
            said = due and phase in MOVING
            if said:
                self._logged_at = now
        self._progress(PhaseChanged(phase=phase, message=text, done=done or 0, total=total))
        if said:
            self._log(text)

    def waits(self, text: str) -> None:
        """What is about to be tried again, from any thread; log and events get the first of it and then some now and then."""
        if self._current is None:
            return
        phase, now = self._current[0], self._clock.now()
        with self._lock:
            said = self._said_at is None or now - self._said_at >= SAY_EVERY
            if said:
                self._said_at = now
            told = self._told_at is None or now - self._told_at >= TELL_EVERY
            if told:
                self._told_at = now
            done, total = self._moved
        if phase is not Phase.running:  # the command goes on, whatever its live outputs wait for
            words = f"{phase.value}, {text}"
            if told:
                self._changed(PhaseChanged(phase=phase, message=words))
            self._progress(PhaseChanged(phase=phase, message=words, done=done or 0, total=total))
        if said:
            self._log(text)

    def finish(self) -> list[PhaseSpan]:
        """Ends the last phase; gives all spans in order."""
        self._end(self._clock.now())
        return list(self._spans)

    def _end(self, now: datetime) -> None:
        if self._current is not None:
            phase, started_at = self._current
            self._spans.append(PhaseSpan(phase=phase.value, started_at=started_at, ended_at=now))
            self._current = None


class Rate:
    """Bytes per second over the last RATE_WINDOW."""

    def __init__(self) -> None:
        self._points: deque[tuple[datetime, int]] = deque()

    def at(self, now: datetime, done: int) -> float | None:
        """Takes a point; None until there is something to compare it with."""
        points = self._points
        if not points or now - points[-1][0] >= RATE_STEP:
            points.append((now, done))
        while len(points) > 2 and now - points[1][0] >= RATE_WINDOW:
            points.popleft()
        then, before = points[0]
        seconds = (now - then).total_seconds()
        return max(0, done - before) / seconds if seconds > 0 else None


def source_words(transfers: Iterable[Transfer]) -> str | None:
    """`downloading from data.example.org and 2 more`; None when nothing comes from a server."""
    servers = sorted({host for one in transfers if (host := urlsplit(one.url).hostname)})
    if not servers:
        return None
    rest = len(servers) - SHOWN_SERVERS
    more = f" and {rest} more" if rest > 0 else ""
    return f"downloading from {', '.join(servers[:SHOWN_SERVERS])}{more}"


def progress_words(phase: Phase, done: int, total: int | None, rate: float | None = None) -> str:
    """`downloading 63 %, 1.2 of 1.9 GB, 240.0 MB/s, 3 s left`; what is unknown is left out."""
    words = [f"{phase.value} {decimal_size(done)}"]
    if total:
        words = [f"{phase.value} {min(100, done * 100 // total)} %"]
        if phase in MOVING:
            words.append(_of(done, total))
    if rate is not None and phase in MOVING:
        words.append(f"{decimal_size(round(rate))}/s")
        if total and rate > 0 and total > done:
            words.append(f"{time_left((total - done) / rate)} left")
    return ", ".join(words)


def time_left(seconds: float) -> str:
    """`3 s`, `2 min 5 s`, `1 h 20 min`: two units at most."""
    whole = max(1, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    if minutes:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{rest} s"


def _of(done: int, total: int) -> str:
    """`1.2 of 1.9 GB`: the unit once where both have the same."""
    first, second = decimal_size(done), decimal_size(total)
    if first.split()[1] == second.split()[1]:
        first = first.split()[0]
    return f"{first} of {second}"
