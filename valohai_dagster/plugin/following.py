"""Following one execution from an op process: words in the event log, observations, and a stop that arrives.

Nothing is yielded while following: Dagster delivers an interrupt by raising in the main thread, and a generator
that is suspended at that moment would not see it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import dagster as dg
from dagster import AssetExecutionContext, DagsterExecutionInterruptedError

from valohai_agent.checksums import decimal_size
from valohai_dagster.errors import ServiceUnavailable
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import EventKind, ExecutionView, FollowEvent
from valohai_dagster.plugin.backend import Backend
from valohai_dagster.plugin.compat import (
    ComputeLogManager,
    observe,
    report_engine_event,
    step_key_of,
)
from valohai_dagster.plugin.compute_logs import ValohaiComputeLogManager
from valohai_dagster.plugin.results import numeric_metrics

OBSERVE_SECONDS = 60.0  # between two observations of running metrics, and before the first
TOLD_OUTPUTS = 100  # of one execution; above that, outputs are counted: a row of the event log costs milliseconds
COUNT_SECONDS = 60.0  # between two counts of them
Interrupts = (DagsterExecutionInterruptedError, KeyboardInterrupt)


def follow_to_end(
    context: AssetExecutionContext,
    backend: Backend,
    spec: ExecutionSpec,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> ExecutionView:
    """The final view. An interrupt stops the execution (K-54), waits for its end and is raised again."""
    follower = Follower(context, backend, spec, clock)
    try:
        backend.submit(spec)
        return follower.wait()
    except Interrupts:
        follower.stop()
        raise


class Follower:
    """One execution, seen from the process that waits for it."""

    def __init__(
        self,
        context: AssetExecutionContext,
        backend: Backend,
        spec: ExecutionSpec,
        clock: Callable[[], float],
    ) -> None:
        self._context, self._backend, self._spec, self._clock = context, backend, spec, clock
        self._observed_at = clock()
        self._latest: dict[str, Any] = {}
        self._seen: set[tuple[Any, ...]] = (
            set()
        )  # following again after an interrupt replays the stream
        self._status: Any = None
        self._standing = ""  # what the last snapshot said
        self._outputs = OutputCount(clock)
        self._stopping = False
        self._execution_id = spec.execution_id  # or of the one that continues it (L-32)
        self._mirror = Mirror(context.instance.compute_log_manager, backend, spec.execution_id)

    def wait(self) -> ExecutionView:
        for event in self._backend.follow(self._spec.execution_id):
            if event is not None:
                self._tell(event)
                if event.kind is EventKind.final:
                    self._mirror.pump()
                    return ExecutionView.model_validate(event.data)
            self._observe()
            self._mirror.pump()
        raise ServiceUnavailable(
            f"the stream of execution {self._spec.execution_id} ended before the execution did; "
            "run `valohai-dagster doctor`, then retry the step: it attaches to the same execution"
        )

    def stop(self) -> None:
        """Forwards an interrupt; each further one is harder: a kill, then leaving the service to it."""
        self._stopping = True
        self._hop("Stop requested: the interrupt reached the process that follows the execution")
        try:
            self._stop(hard=False)
            self._wait_for_stop()
        except Interrupts:
            self._hop("Interrupted again: asking for a hard stop")
            self._stop(hard=True)
            self._wait_for_stop()

    def _stop(self, *, hard: bool) -> None:
        reason = f"Dagster run {self._spec.run_id} was terminated"
        try:
            self._backend.stop(self._spec.execution_id, hard=hard, reason=reason)
        except ServiceUnavailable as error:
            self._hop(f"The stop could not be handed over: {error}")
            return
        self._hop(f"Handed the {'hard ' if hard else ''}stop over to the execution service")

    def _wait_for_stop(self) -> None:
        try:
            view = self.wait()
        except ServiceUnavailable as error:
            self._hop(f"The end of the execution could not be seen: {error}")
            return
        self._hop(
            f"The execution ended with status {view.status.value}: {view.reason or 'stopped'}"
        )

    # -- telling ---------------------------------------------------------------------------------------------------
    def _tell(self, event: FollowEvent) -> None:
        identity = (event.kind, event.time, event.attempt, event.message)
        if event.kind is EventKind.progress or identity in self._seen:
            return
        self._seen.add(identity)
        before, self._status = self._status, event.data.get("status") or self._status
        if event.kind is EventKind.metadata:
            self._latest.update(event.data.get("latest") or {})
        elif event.kind is EventKind.warning:
            self._context.log.warning(self._named(event.message))
        elif event.kind is EventKind.snapshot:
            self._tell_snapshot(event, before)
        elif event.kind is EventKind.output:
            if words := self._outputs.add(event):
                self._say(words)
        elif event.message:
            if event.kind is EventKind.final and (words := self._outputs.words()):
                self._say(words)
            self._say(event.message)
        if following := event.data.get("continued_by"):
            self._mirror.turn_to(following)
            self._execution_id = following

    def _tell_snapshot(self, event: FollowEvent, before: Any) -> None:
        """Silence is answered by a snapshot each time; one that says nothing new would read like another start."""
        self._latest.update(event.data.get("latest_metadata") or {})
        status = getattr(self._status, "value", self._status)
        words = event.message or f"the execution is {status}"
        if self._status != before or words not in (status, self._standing):
            self._say(words)
        self._standing = words

    def _say(self, message: str) -> None:
        if self._stopping:
            self._hop(message)
        else:
            self._context.log.info(self._named(message))

    def _named(self, message: str) -> str:
        return f"execution {self._execution_id[:8]}: {message}"

    def _hop(self, message: str) -> None:
        """A step of the stop's way to the container and back, as an event of its own."""
        report_engine_event(
            self._context.instance,
            self._context.run,
            self._named(message),
            step_key=step_key_of(self._context),
            metadata={"execution": self._execution_id},
        )

    # -- metrics while running ----------------------------------------------------------------------------------------
    def _observe(self) -> None:
        """One observation at most per minute, and none when nothing is new; the last values are in the materialization."""
        numbers = numeric_metrics(self._latest)
        now = self._clock()
        if not numbers or now - self._observed_at < OBSERVE_SECONDS:
            return
        self._observed_at, self._latest = now, {}
        metadata = {
            f"metrics/{name}": dg.MetadataValue.float(value) for name, value in numbers.items()
        }
        key = dg.AssetKey(self._spec.asset_key or [])
        observe(self._context, dg.AssetObservation(asset_key=key, metadata=metadata))


class OutputCount:
    """Which stored outputs become a line: the first ones each, the others together now and then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._files = self._bytes = 0
        self._told_at = clock()

    def add(self, event: FollowEvent) -> str | None:
        """The line to write, if any."""
        self._files += 1
        self._bytes += int(event.data.get("size") or 0)
        if self._files <= TOLD_OUTPUTS:
            self._told_at = self._clock()
            return event.message
        if self._clock() - self._told_at < COUNT_SECONDS:
            return None
        self._told_at = self._clock()
        return f"stored {self._files:,} outputs so far, {decimal_size(self._bytes)}"

    def words(self) -> str | None:
        """What all of them came to, where not each had a line."""
        if self._files <= TOLD_OUTPUTS:
            return None
        size = decimal_size(self._bytes)
        return f"stored {self._files:,} outputs, {size}; the first {TOLD_OUTPUTS} are named above"


class Mirror:
    """Repeats the execution's log on this process's own streams where Dagster's log manager is not ours.

    Without it the stdout and stderr tabs of such an instance would stay empty.
    """

    def __init__(
        self, manager: ComputeLogManager[Any], backend: Backend, execution_id: str
    ) -> None:
        self._active = not isinstance(manager, ValohaiComputeLogManager)
        self._backend, self._execution_id = backend, execution_id
        self._cursor: str | None = None

    def turn_to(self, execution_id: str) -> None:
        """All of the one before is repeated first."""
        self.pump()
        self._execution_id, self._cursor = execution_id, None

    def pump(self) -> None:
        if not self._active:
            return
        chunk = self._backend.log_after(self._execution_id, self._cursor)
        if chunk is None:
            return
        self._cursor = str(chunk.position)
        for stream, data in ((sys.stdout, chunk.stdout), (sys.stderr, chunk.stderr)):
            if data:
                stream.write(data.decode("utf-8", "replace"))
                stream.flush()
