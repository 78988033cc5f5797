"""One try of one step: an execution is handed to the service, and what becomes of it is written as events."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import dagster as dg
from dagster import (
    AssetCheckEvaluation,
    AssetKey,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    EventLogEntry,
)

from valohai_dagster.errors import ValohaiError
from valohai_dagster.executions.access import launcher_of
from valohai_dagster.executions.effects import leased_text
from valohai_dagster.executions.service import ExecutionService
from valohai_dagster.executions.spec import LaunchIds, StepConfig
from valohai_dagster.executions.spec_model import ExecutionSpec, execution_id_of
from valohai_dagster.executions.stream import (
    EventKind,
    ExecutionStatus,
    ExecutionView,
    FollowEvent,
)
from valohai_dagster.plugin.compat import CODE_VERSION_TAG, log_key_of_event
from valohai_dagster.plugin.compat.engine import (
    DagsterEvent,
    RetryMode,
)
from valohai_dagster.plugin.driver.ends import (
    Retries,
    blocking_failure,
    failure_entries,
    interrupted_entries,
    materializations,
)
from valohai_dagster.plugin.driver.events import StepEvents
from valohai_dagster.plugin.driver.facts import StepFacts
from valohai_dagster.plugin.driver.mailbox import Mailbox, told_in_log
from valohai_dagster.plugin.driver.platform import Platform
from valohai_dagster.plugin.driver.provenance import Parents, Provenance
from valohai_dagster.plugin.driver.recovery import identity
from valohai_dagster.plugin.launching import (
    STDERR_LINES,
    StepFailure,
    code_version_of,
    config_of,
    failed,
    failure_of,
    spec_of,
    upstream_of,
)
from valohai_dagster.plugin.partitions import RunPartitions
from valohai_dagster.plugin.results import materialize_result, numeric_metrics
from valohai_dagster.plugin.used_inputs import unseen, used_sources, used_upstream

T = TypeVar("T")

OBSERVE_SECONDS = 60.0  # between two observations of running metrics, and before the first
NAMED_OUTPUTS = 10  # in one line
TOLD_PHASES = ("pulling", "downloading", "running")  # each thing said of them: once per attempt


class Driven(Protocol):
    """The run, as far as its steps use it."""

    @property
    def job_name(self) -> str: ...

    @property
    def run_id(self) -> str: ...

    @property
    def instance_id(self) -> str: ...

    @property
    def instance(self) -> DagsterInstance: ...

    @property
    def dagster_run(self) -> DagsterRun: ...

    @property
    def platform(self) -> Platform: ...

    @property
    def service(self) -> ExecutionService: ...

    @property
    def resumed(self) -> bool: ...

    @property
    def terminating(self) -> bool: ...

    @property
    def deleted(self) -> bool: ...

    @property
    def retry_mode(self) -> RetryMode: ...

    @property
    def run_config(self) -> Mapping[str, Any]: ...

    @property
    def resolved_config(self) -> Mapping[str, Any]: ...

    def partitions(self, facts: StepFacts) -> RunPartitions: ...

    def partition_keys(self, facts: StepFacts) -> Sequence[str]: ...

    def parent_partitions(self, facts: StepFacts) -> Mapping[str, Sequence[str]]: ...

    def log_links(self, view: ExecutionView) -> Mapping[str, str]: ...

    def open_mailbox(self, execution_id: str) -> Mailbox: ...

    def close_mailbox(self, execution_id: str) -> None: ...

    async def call(self, call: Callable[[], T]) -> T: ...

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T: ...

    async def write(self, entries: Sequence[EventLogEntry]) -> None: ...


class StepTry:
    """`drive()` returns the event that ended the try."""

    def __init__(
        self,
        run: Driven,
        facts: StepFacts,
        *,
        previous_attempts: int,
        written: set[tuple[Any, ...]],
        started_at: float | None,
    ) -> None:
        self._run, self._facts = run, facts
        self._tag = facts.tag
        self._previous_attempts = previous_attempts
        self._written = written  # identities that are in the log already
        self._started_at = started_at
        self._events = StepEvents(run.job_name, run.run_id, facts.step, facts.output_types)
        self._provenance = Provenance()
        self._warnings: list[str] = []  # about what the launch asks for
        self._told: set[tuple[int, str]] = set()
        self._leased = int((DagsterEventType.STEP_WORKER_STARTED,) in written)  # by which attempt
        self._restart = 0  # which of the executions that continue each other
        self._observed_at = started_at
        self._key = AssetKey(list(facts.tag.asset_key))
        self.execution_id = execution_id_of(
            run.instance_id, run.run_id, facts.step.key, previous_attempts
        )

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs that are in the log."""
        return sorted(i[1] for i in self._written if i[0] is DagsterEventType.STEP_OUTPUT)

    # -- the course of a try --------------------------------------------------------------------------------------
    async def drive(self) -> DagsterEvent:
        """Raises `LaneClosed` when another process goes on with the run."""
        mailbox = self._run.open_mailbox(self.execution_id)
        try:
            view = await self._begin(mailbox)
            while view.continued_by is not None:
                mailbox = self._turn_to(view.continued_by)
                view = await self._go_on(mailbox, view)
            event = await self._end(view)
            told_in_log(mailbox.final_reported_at)
            return event
        except ValohaiError as error:
            return await self._fail(failure_of(error))
        finally:
            self._run.close_mailbox(self.execution_id)

    async def _begin(self, mailbox: Mailbox) -> ExecutionView:
        """Hands the execution over, or finds it again, and follows it to its end."""
        service = self._run.service
        view = await self._run.patiently(self._look) if self._run.resumed else None
        if view is None:
            spec = await self._run.call(self._prepare)
            view = await self._run.patiently(lambda: service.submit(spec))
        else:
            await self._run.call(self._remember)
        await self._write(self._opening(view, mailbox))
        return await self._follow(mailbox, view)

    def _turn_to(self, execution_id: str) -> Mailbox:
        """L-32: another execution continues the one that was followed; for Dagster it is the same try of the step."""
        self._run.close_mailbox(self.execution_id)
        self.execution_id = execution_id
        self._restart += 1
        self._leased = -1
        self._told.clear()
        return self._run.open_mailbox(execution_id)

    async def _go_on(self, mailbox: Mailbox, before: ExecutionView) -> ExecutionView:
        view = await self._run.patiently(self._look)
        assert view is not None, "it was written together with the end of the one before"
        text = f"execution #{view.counter} continues #{before.counter}: {before.reason}"
        entries = self._engine_event(text)
        if view.worker:  # leased before anybody was there to be told
            self._leased = view.attempt
            entries += self._engine_event(leased_text(view.worker, view.host, view.runtime))
        await self._write(entries)
        return await self._follow(mailbox, view)

    async def _follow(self, mailbox: Mailbox, view: ExecutionView) -> ExecutionView:
        if self._run.terminating and not view.status.final:
            await self._run.patiently(self.stop)
        while not view.status.final and mailbox.final is None:
            await self._tell(mailbox)
            if mailbox.final is None:
                await mailbox.wait(self._observe_in())
        await self._tell(mailbox)
        return mailbox.final or view

    async def _look(self) -> ExecutionView | None:
        return await self._run.service.view(self.execution_id)

    async def stop(self, *, hard: bool = False) -> None:
        """Asks the service to stop the execution (K-54)."""
        what = "deleted" if self._run.deleted else "terminated"
        reason = f"Dagster run {self._run.run_id} was {what}"
        await self._run.service.stop(self.execution_id, hard=hard, reason=reason)

    async def _end(self, view: ExecutionView) -> DagsterEvent:
        if view.status is ExecutionStatus.complete:
            return await self._succeed(view)
        if view.status is ExecutionStatus.stopped and self._run.terminating:
            told = self._events.engine(_stopped_text(view), execution=self.execution_id)
            entries = interrupted_entries(self._events, self._retries())
            return await self._finish([*self._start(), *told, *entries])
        stderr = await self._run.call(lambda: self._run.platform.last_stderr(view.id, STDERR_LINES))
        return await self._fail(failed(view, stderr))

    # -- before -----------------------------------------------------------------------------------------------------
    def _prepare(self) -> ExecutionSpec:
        """Blocks. Raises `ValohaiError` when the launch asks for something that cannot be."""
        run, facts = self._run, self._facts
        config = self._config()
        launch = run.platform.commit(self._tag, config)
        self._tag = launch.tag
        parents = Parents(
            run.instance, run.dagster_run, self._tag.parents, run.parent_partitions(facts)
        )
        warn = self._warnings.append
        upstream = upstream_of(
            self._tag, lambda key: parents.records(key, warn), run.platform.view, warn
        )
        self._provenance = parents.provenance()
        spec = spec_of(
            self._tag,
            config=config,
            commit=launch.commit,
            ids=self._ids(),
            upstream=upstream,
            partitions=run.partitions(facts),
            archive_warnings=[*self._warnings, *launch.warnings],
        )
        self._warnings = spec.warnings
        kept = {"provenance": self._provenance.to_dict(), "warnings": self._warnings}
        return spec.model_copy(update={"client": kept})

    def _config(self) -> StepConfig:
        run = self._run
        path = self._facts.path
        return config_of(self._tag, run.run_config, path, resolved=run.resolved_config)

    def _ids(self) -> LaunchIds:
        run = self._run
        return LaunchIds(
            execution_id=self.execution_id,
            instance_id=run.instance_id,
            run_id=run.run_id,
            step_key=self._facts.step.key,
            retry_number=self._previous_attempts,
            log_key=self._log_key(),
            asset_key=list(self._tag.asset_key),
            launcher=launcher_of(run.dagster_run.tags),
        )

    def _log_key(self) -> Sequence[str]:
        return log_key_of_event(self._run.run_id, self.execution_id.replace("-", "")[:12])

    def _remember(self) -> None:
        """What the process that submitted the execution knew."""
        kept = self._run.platform.client_data(self.execution_id)
        self._provenance = Provenance.from_dict(kept.get("provenance") or {})
        self._warnings = list(kept.get("warnings") or [])

    # -- while it runs --------------------------------------------------------------------------------------------------
    def _opening(self, view: ExecutionView, mailbox: Mailbox) -> list[EventLogEntry]:
        """Log capture, that a worker is looked for and where in the queue, and what else is known by now."""
        events = mailbox.take()
        first = next((e for e in events if e.data.get("status") == "queued"), None)
        text = first.message if first else f"execution #{view.counter} is {view.status.value}"
        entries = self._events.logs_captured(self._log_key(), self._run.log_links(view))
        entries += self._events.worker_starting(
            text, execution=self.execution_id, environment=view.environment
        )
        for event in events:
            if event is not first:
                entries += self._told_of(event)
        if view.worker and not self._leased:  # leased before anybody was there to be told
            text = leased_text(view.worker, view.host, view.runtime)
            entries += self._leased_by(text, view.worker, view.attempt)
        return entries

    def _leased_by(self, message: str, worker: str | None, attempt: int) -> list[EventLogEntry]:
        self._leased = attempt
        return [*self._events.worker_started(message, worker=worker or ""), *self._start()]

    async def _tell(self, mailbox: Mailbox) -> None:
        told = [(event, self._told_of(event)) for event in mailbox.take()]
        entries = [entry for _, made in told for entry in made]
        await self._write([*entries, *self._observation(mailbox)])
        for event, made in told:
            told_in_log(event.reported_at if made else None)

    def _told_of(self, event: FollowEvent) -> list[EventLogEntry]:
        """Changes of state become events; progress goes to the live stream only."""
        if event.kind is EventKind.warning:
            return self._engine(event)
        status, phase = event.data.get("status"), event.data.get("phase")
        if status == ExecutionStatus.started.value and event.attempt == self._leased:
            return []
        if status == ExecutionStatus.started.value and not self._leased:
            return self._leased_by(event.message, event.data.get("worker"), event.attempt)
        if phase is not None:
            key = (event.attempt, event.message)
            if phase not in TOLD_PHASES or key in self._told:
                return []
            self._told.add(key)
        return self._engine(event)

    def _engine(self, event: FollowEvent) -> list[EventLogEntry]:
        again = {"attempt": event.attempt} if event.attempt > 1 else {}
        return self._engine_event(event.message, **again)

    def _engine_event(self, message: str, **values: int) -> list[EventLogEntry]:
        restart = {"restart": self._restart} if self._restart else {}
        return self._events.engine(message, execution=self.execution_id, **values, **restart)

    def _start(self) -> list[EventLogEntry]:
        """STEP_START, once; a step that ends without ever having a worker starts just before its end."""
        if self._started_at is not None:
            return []
        entries = self._events.start(self._previous_attempts)
        self._started_at = self._observed_at = entries[0].timestamp
        return [*entries, *(e for text in self._warnings for e in self._events.warning(text))]

    def _observe_in(self) -> float | None:
        if self._observed_at is None:
            return None
        return max(0.1, self._observed_at + OBSERVE_SECONDS - time.time())

    def _observation(self, mailbox: Mailbox) -> list[EventLogEntry]:
        """Metrics of a long run, at most once a minute; the last ones are in the materialization."""
        due = self._observed_at is not None and time.time() - self._observed_at >= OBSERVE_SECONDS
        if not due or mailbox.final is not None:
            return []
        self._observed_at = time.time()
        numbers, mailbox.latest = numeric_metrics(mailbox.latest), {}
        metadata = {f"metrics/{name}": dg.MetadataValue.float(v) for name, v in numbers.items()}
        observation = dg.AssetObservation(asset_key=self._key, metadata=metadata)
        return self._events.observation(observation) if metadata else []

    # -- after ----------------------------------------------------------------------------------------------------------
    async def _fail(self, failure: StepFailure) -> DagsterEvent:
        opening = []
        if not self._written:  # refused before an execution was there
            opening = self._events.logs_captured(self._log_key(), {})
        return await self._finish(
            [*opening, *self._start(), *failure_entries(self._events, failure, self._retries())]
        )

    def _retries(self) -> Retries:
        return Retries(
            policy=self._tag.retry.policy() if self._tag.retry else None,
            mode=self._run.retry_mode,
            previous_attempts=self._previous_attempts,
        )

    async def _succeed(self, view: ExecutionView) -> DagsterEvent:
        """What was seen of outside sources, outputs, materializations, checks and the end, in the engine's order."""
        seen = await self._run.call(lambda: unseen(self._run.instance, self._tag, view))
        if seen:
            told = [entry for one in seen for entry in self._events.observation(one)]
            await self._write([*self._start(), *told])
        entries = await self._run.call(lambda: self._outputs(view))
        if not self._tag.checks:
            return await self._finish([*entries, *self._events.success(self._seconds())])
        await self._write(entries)
        evaluations = await self._run.call(lambda: self._evaluations(view))
        entries = []
        for evaluation in evaluations:
            entries += self._events.output(self._facts.check_outputs[evaluation.check_name], {})
            entries += self._events.check(evaluation)
        end = blocking_failure(self._events, evaluations)
        return await self._finish([*entries, *(end or self._events.success(self._seconds()))])

    def _outputs(self, view: ExecutionView) -> list[EventLogEntry]:
        """Blocks: small pictures are read."""
        run, tag = self._run, self._tag
        parents = run.parent_partitions(self._facts)
        used = used_upstream(
            run.instance,
            tag,
            view,
            run.platform.origins,
            given=self._config().inputs,
            partitioned=lambda key: key.to_user_string() in parents,
        )
        provenance = self._provenance.with_used([*used_sources(run.instance, tag, view), *used])
        result = materialize_result(view, exported=tag.exported, read_small=run.platform.read_small)
        version = result.data_version.value if result.data_version else ""
        tags = {
            **provenance.tags(version, self._facts.tag.code_version),
            **(result.tags or {}),
            CODE_VERSION_TAG: code_version_of(tag.step, view.commit),
        }
        entries = [*self._start(), *self._events.output(tag.output, result.metadata or {})]
        keys = run.partition_keys(self._facts)
        for materialization in materializations(self._key, result, tags, keys):
            entries += self._events.materialization(materialization)
        return entries

    def _evaluations(self, view: ExecutionView) -> list[AssetCheckEvaluation]:
        from valohai_dagster.plugin.driver.check_results import evaluations

        return evaluations(self._run.instance, self._run.run_id, self._key, self._tag.checks, view)

    def _seconds(self) -> float:
        return time.time() - (self._started_at or time.time())

    # -- writing ----------------------------------------------------------------------------------------------------------
    async def _finish(self, entries: Sequence[EventLogEntry]) -> DagsterEvent:
        await self._write(entries)
        end = entries[-1].dagster_event
        assert end is not None
        return end

    async def _write(self, entries: Sequence[EventLogEntry]) -> None:
        new = [entry for entry in entries if identity(entry) not in self._written]
        await self._run.write(new)
        self._written.update(map(identity, new))


def _stopped_text(view: ExecutionView) -> str:
    kept = ", ".join(datum.name for datum in view.outputs[:NAMED_OUTPUTS])
    more = len(view.outputs) - NAMED_OUTPUTS
    outputs = f"; stored outputs: {kept}" + (f" and {more} more" if more > 0 else "")
    reason = view.reason or "stopped"
    return f"the execution ended with status {view.status.value}: {reason}{outputs if kept else ''}"
