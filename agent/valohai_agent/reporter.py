"""Delivers the reports of one attempt in order, whatever happens to Redis meanwhile.

Nothing here blocks the job: reports queue up (on disk when there are many) and one thread sends them. Delivery is at
least once; the control plane drops repeats by `seq`. Sequence numbers only grow, but may have gaps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from valohai_agent.clock import Clock
from valohai_agent.protocol import Finished, MetadataEvents, PhaseChanged, Report, ReportBody
from valohai_agent.redis_link import RedisLink
from valohai_agent.spool import Spool

REPORT_SECONDS = 1.0  # at most one progress report and one metadata report in this time
METADATA_BYTES = 128 * 1024  # a batch is closed at this size even while Redis is away
HISTORY_BYTES = 8 * 1024 * 1024  # what can be told again after Redis was emptied


class Reporter:
    """Reports of one attempt. `worker` is asked for each report, since an agent may have to change its name.

    Redis takes a report only under the attempt's lease. If the lease is gone, `reclaim` renews it before anything else
    is sent: only then is it known whether Redis was emptied and all has to be told again, in order. Whoever renews
    holds `sending` while it does.
    """

    def __init__(
        self,
        link: RedisLink,
        *,
        stream: str,
        lease_key: str,
        reclaim: Callable[[], object],
        execution_id: str,
        attempt: int,
        token: str,
        worker: Callable[[], str],
        clock: Clock,
        spool_dir: Path | None = None,
    ) -> None:
        self.sending = threading.Lock()
        self._link, self._clock, self._worker = link, clock, worker
        self._keys, self._token, self._reclaim = [stream, lease_key], token, reclaim
        self._identity = {"execution_id": execution_id, "attempt": attempt, "token": token}
        self._changed = threading.Condition()
        self._outbox = Spool(spool_dir)
        self._again: deque[str] = deque()
        self._history: deque[str] = deque()
        self._history_bytes = 0
        self._seq = 0
        self._progress: PhaseChanged | None = None
        self._metadata: list[dict[str, Any]] = []
        self._metadata_bytes = 0
        self._batch_due_at = 0.0
        self._closing = False
        self._ending = False
        self._dropped = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"reports-{execution_id[:8]}", daemon=True
        )
        self._thread.start()

    def send(self, body: ReportBody) -> None:
        """Queues a report. Metadata that waits goes first; progress of a phase that is over is left out."""
        with self._changed:
            self._close_metadata_batch()
            if isinstance(body, (PhaseChanged, Finished)):
                self._progress = None
            self._enqueue(body)
            self._ending = self._ending or isinstance(body, Finished)
            self._changed.notify_all()

    def progress(self, body: PhaseChanged) -> None:
        """Queues progress; only the newest survives until the next report is due."""
        with self._changed:
            self._progress = body
            self._changed.notify_all()

    def metadata(self, events: list[dict[str, Any]]) -> None:
        """Queues metadata events; they travel in batches and none is left out."""
        with self._changed:
            self._metadata.extend(events)
            self._metadata_bytes += sum(len(repr(event)) for event in events)
            if self._metadata_bytes > METADATA_BYTES:
                self._close_metadata_batch()
            self._changed.notify_all()

    def replay(self) -> None:
        """Tells everything again that is still remembered, since Redis may have lost it unread."""
        with self._changed:
            self._again = deque(self._history)
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all is delivered; False after `timeout` seconds or when the rest was dropped."""
        with self._changed:
            self._close_metadata_batch()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._empty() or self._dropped.is_set(), timeout)
            return self._empty()

    @property
    def told_the_end(self) -> bool:
        """Whether `finished` is delivered, so that the lease is the control plane's to remove."""
        with self._changed:
            return self._ending and self._empty()

    def drop(self) -> None:
        """Forgets what is not delivered: another attempt holds the lease, so nothing of this one counts."""
        self._dropped.set()
        with self._changed:
            self._outbox.clear()
            self._again.clear()
            self._metadata.clear()
            self._progress = None
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread once it has nothing to send. After `drop` it takes nothing any more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # -- inside, with the lock held ---------------------------------------------------------------------------------
    def _empty(self) -> bool:
        return not (self._again or len(self._outbox) or self._metadata)

    def _enqueue(self, body: ReportBody) -> None:
        if self._dropped.is_set():
            return
        self._seq += 1
        report = Report(
            **self._identity,
            seq=self._seq,
            worker=self._worker(),
            time=self._clock.now(),
            clock_offset_seconds=round(self._link.clock_offset_seconds, 4),
            body=body,
        )
        self._outbox.append(report.model_dump_json(exclude_none=True))

    def _close_metadata_batch(self) -> None:
        if self._metadata:
            events, self._metadata, self._metadata_bytes = self._metadata, [], 0
            self._enqueue(MetadataEvents(events=events))

    def _close_due_batches(self) -> None:
        """While older reports wait for Redis, progress and metadata go on gathering."""
        now = self._clock.monotonic()
        if len(self._outbox) or now < self._batch_due_at or not (self._metadata or self._progress):
            return
        self._batch_due_at = now + REPORT_SECONDS
        self._close_metadata_batch()
        if self._progress is not None:
            progress, self._progress = self._progress, None
            self._enqueue(progress)

    def _head(self) -> str | None:
        with self._changed:
            return self._again[0] if self._again else self._outbox.peek()

    def _next(self) -> str | None:
        """Waits for the next report to send; None when closed and done."""
        with self._changed:
            while True:
                self._close_due_batches()
                head = self._head()
                if head is not None:
                    return head
                if self._closing or self._dropped.is_set():
                    return None
                gathering = self._metadata or self._progress
                self._changed.wait(REPORT_SECONDS / 4 if gathering else None)

    def _sent(self, text: str) -> None:
        with self._changed:
            if self._again and self._again[0] is text:
                self._again.popleft()
            elif self._outbox.peek() is text:
                self._outbox.pop()
                self._remember(text)
            self._changed.notify_all()

    def _remember(self, text: str) -> None:
        self._history.append(text)
        self._history_bytes += len(text)
        while self._history_bytes > HISTORY_BYTES:
            self._history_bytes -= len(self._history.popleft())

    def _run(self) -> None:
        while (text := self._next()) is not None:
            accepted = self._link.persist(
                lambda text=text: self._deliver(text),
                give_up=self._dropped.is_set,
                wake=self._dropped,
            )
            if accepted is None:
                self.drop()  # fenced, or the link was closed: the agent ends
                return
            if not accepted:
                self._reclaim()

    def _deliver(self, text: str) -> bool:
        """True when there is nothing more to do for this text: sent, or no longer the first since all is told again."""
        with self.sending:
            if self._head() is not text:
                return True
            accepted = bool(self._link.fcall("vh1_report", self._keys, self._token, text))
            if accepted:
                self._sent(text)
            return accepted
