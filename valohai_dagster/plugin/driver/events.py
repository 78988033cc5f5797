"""The events of a run and its steps, made by Dagster's own constructors, so that they read as the engine's do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import dagster as dg
from dagster import AssetCheckEvaluation, AssetMaterialization, EventLogEntry

from valohai_dagster.plugin.compat.engine import (
    DagsterEvent,
    DagsterEventBatchMetadata,
    EngineEventData,
    ErrorSource,
    ExecutionStep,
    IPlanContext,
    IStepContext,
    RunFailureReason,
    SerializableErrorInfo,
    StepFailureData,
    StepOutputData,
    StepOutputHandle,
    StepRetryData,
    StepSuccessData,
    TypeCheckData,
    UserFailureData,
    logs_captured,
)

INTERRUPTED = SerializableErrorInfo(
    message="dagster._core.errors.DagsterExecutionInterruptedError\n",
    stack=[],
    cls_name="DagsterExecutionInterruptedError",
)


class Recorder(IPlanContext):
    """Stands where the engine's context stands, and keeps the entries instead of storing them."""

    def __init__(self, job_name: str, run_id: str) -> None:
        self._job_name, self._run_id = job_name, run_id
        self._entries: list[EventLogEntry] = []

    # -- what the constructors ask for ----------------------------------------------------------------------------
    @property
    def plan_data(self) -> Any:
        raise NotImplementedError("the run driver has no user code")

    @property
    def output_capture(self) -> None:
        return None

    @property
    def log(self) -> Any:
        return self

    @property
    def job_name(self) -> str:
        return self._job_name

    @property
    def run_id(self) -> str:
        return self._run_id

    def log_dagster_event(
        self,
        level: int,
        msg: str,
        dagster_event: DagsterEvent,
        batch_metadata: DagsterEventBatchMetadata | None = None,
    ) -> None:
        self._entries.append(
            EventLogEntry(
                error_info=None,
                level=level,
                user_message=msg,
                run_id=self._run_id,
                timestamp=time.time(),
                step_key=dagster_event.step_key,
                job_name=self._job_name,
                dagster_event=dagster_event,
            )
        )

    # -- what the driver asks for ---------------------------------------------------------------------------------
    def line(self, level: int, message: str, step_key: str | None = None) -> None:
        """A plain log line, no event."""
        self._entries.append(
            EventLogEntry(
                error_info=None,
                level=level,
                user_message=message,
                run_id=self._run_id,
                timestamp=time.time(),
                step_key=step_key,
                job_name=self._job_name,
            )
        )

    def take(self) -> list[EventLogEntry]:
        """The entries made since the last call, in order."""
        entries, self._entries = self._entries, []
        return entries


class StepRecorder(Recorder, IStepContext):
    """The same for one step."""

    def __init__(
        self, job_name: str, run_id: str, step: ExecutionStep, output_types: Mapping[str, str]
    ) -> None:
        super().__init__(job_name, run_id)
        self._step, self._types = step, output_types

    @property
    def step(self) -> ExecutionStep:
        return self._step

    @property
    def node_handle(self) -> Any:
        return self.step.node_handle

    @property
    def event_tags(self) -> Mapping[str, str]:
        return {
            "job_name": self._job_name,
            "op_name": self.step.node_handle.name,
            "resource_fn_name": "None",
            "resource_name": "None",
            "run_id": self._run_id,
            "step_key": self.step.key,
        }

    @property
    def op(self) -> Any:
        return self

    def output_def_named(self, name: str) -> Any:
        display_name = self._types.get(name, "Any")
        return SimpleNamespace(dagster_type=SimpleNamespace(display_name=display_name))


class RunEvents:
    """Events of the run itself; each method returns the entries to write, in order."""

    def __init__(self, job_name: str, run_id: str) -> None:
        self._context = Recorder(job_name, run_id)

    def start(self) -> list[EventLogEntry]:
        DagsterEvent.job_start(self._context)
        return self._context.take()

    def success(self) -> list[EventLogEntry]:
        DagsterEvent.job_success(self._context)
        return self._context.take()

    def failure(self, failed: Sequence[DagsterEvent]) -> list[EventLogEntry]:
        """`failed`: the STEP_FAILURE events, earliest first."""
        DagsterEvent.job_failure(
            self._context,
            f"Steps failed: {[event.step_key for event in failed]}.",
            failure_reason=RunFailureReason.STEP_FAILURE,
            first_step_failure_event=failed[0],
        )
        return self._context.take()

    def broken(self, error: SerializableErrorInfo) -> list[EventLogEntry]:
        """The run cannot be driven on."""
        DagsterEvent.job_failure(
            self._context,
            "An exception was thrown during execution.",
            failure_reason=RunFailureReason.RUN_EXCEPTION,
            error_info=error,
        )
        return self._context.take()

    def canceled(self, failed: Sequence[DagsterEvent], *, interrupted: bool) -> list[EventLogEntry]:
        if interrupted or not failed:
            DagsterEvent.job_canceled(self._context, INTERRUPTED)
        else:
            keys = [event.step_key for event in failed]
            DagsterEvent.job_canceled(
                self._context, message=f"Run was canceled. Failed steps: {keys}."
            )
        return self._context.take()

    def engine(self, message: str, **metadata: Any) -> list[EventLogEntry]:
        return engine_event(self._context, message, metadata)


class StepEvents:
    """Events of one try of a step."""

    def __init__(
        self, job_name: str, run_id: str, step: ExecutionStep, output_types: Mapping[str, str]
    ) -> None:
        self._context = StepRecorder(job_name, run_id, step, output_types)
        self._run_context = Recorder(job_name, run_id)
        self._step = step

    def logs_captured(
        self, log_key: Sequence[str], links: Mapping[str, str]
    ) -> list[EventLogEntry]:
        logs_captured(self._run_context, self._step.key, log_key, links)
        return self._run_context.take()

    def worker_starting(self, message: str, **metadata: Any) -> list[EventLogEntry]:
        DagsterEvent.step_worker_starting(self._context, message, metadata)
        return self._context.take()

    def worker_started(self, message: str, **metadata: Any) -> list[EventLogEntry]:
        names = self._context.job_name, message, metadata, self._step.key
        DagsterEvent.step_worker_started(self._context.log, *names)
        return self._context.take()

    def start(self, previous_attempts: int) -> list[EventLogEntry]:
        if previous_attempts:
            DagsterEvent.step_restarted_event(self._context, previous_attempts)
        else:
            DagsterEvent.step_start_event(self._context)
        return self._context.take()

    def engine(self, message: str, **metadata: Any) -> list[EventLogEntry]:
        return engine_event(self._context, message, metadata)

    def warning(self, message: str) -> list[EventLogEntry]:
        """A log line, as `context.log.warning` writes it."""
        self._context.line(30, message, self._step.key)
        return self._context.take()

    def pool_blocked(self, pool: str, *, initial: bool) -> list[EventLogEntry]:
        DagsterEvent.step_concurrency_blocked(self._context, pool, initial=initial)
        return self._context.take()

    def skipped(self, dependencies: Sequence[str]) -> list[EventLogEntry]:
        key = self._step.key
        self._context.line(
            20, f"Skipping step {key} due to skipped dependencies: {dependencies}.", key
        )
        DagsterEvent.step_skipped_event(self._context)
        return self._context.take()

    def abandoned(self, failed: Sequence[str], abandoned: Sequence[str]) -> list[EventLogEntry]:
        """A log line only: the engine has no event for it."""
        why = f" failed: {list(failed)}" if failed else ""
        why += f" were not executed: {list(abandoned)}" if abandoned else ""
        key = self._step.key
        self._context.line(40, f"Dependencies for step {key}{why}. Not executing.", key)
        return self._context.take()

    def observation(self, observation: dg.AssetObservation) -> list[EventLogEntry]:
        DagsterEvent.asset_observation(self._context, observation)
        return self._context.take()

    def output(self, name: str, metadata: Mapping[str, Any]) -> list[EventLogEntry]:
        check = TypeCheckData(success=True, label=name, description=None, metadata={})
        handle = StepOutputHandle(step_key=self._step.key, output_name=name)
        data = StepOutputData(
            step_output_handle=handle, type_check_data=check, metadata=dict(metadata)
        )
        DagsterEvent.step_output_event(self._context, data)  # pyright: ignore[reportArgumentType]
        return self._context.take()

    def materialization(
        self,
        materialization: AssetMaterialization,
        batch: DagsterEventBatchMetadata | None = None,
    ) -> list[EventLogEntry]:
        DagsterEvent.asset_materialization(self._context, materialization, batch)
        return self._context.take()

    def check(self, evaluation: AssetCheckEvaluation) -> list[EventLogEntry]:
        DagsterEvent.asset_check_evaluation(self._context, evaluation)
        return self._context.take()

    def success(self, seconds: float) -> list[EventLogEntry]:
        data = StepSuccessData(duration_ms=max(0.0, seconds) * 1000)
        DagsterEvent.step_success_event(self._context, data)
        return self._context.take()

    def retry(self, error: SerializableErrorInfo, seconds: float | None) -> list[EventLogEntry]:
        data = StepRetryData(error=error, seconds_to_wait=seconds)
        DagsterEvent.step_retry_event(self._context, data)
        return self._context.take()

    def failure(
        self,
        error: SerializableErrorInfo,
        *,
        user: UserFailureData | None = None,
        source: ErrorSource | None = None,
    ) -> list[EventLogEntry]:
        data = StepFailureData(error=error, user_failure_data=user, error_source=source)
        DagsterEvent.step_failure_event(self._context, data)
        return self._context.take()


def engine_event(
    context: Recorder, message: str, metadata: Mapping[str, Any]
) -> list[EventLogEntry]:
    DagsterEvent.engine_event(context, message, EngineEventData(metadata=dict(metadata)))
    return context.take()
