"""`ValohaiRunLauncher`: hands runs whose every step is an execution to the conductor, others to Dagster's launcher.

A hand-over is a row in the records; Redis only tells the conductor of it. Nothing of the run lives in the process
that launched it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, DefaultRunLauncher
from typing_extensions import Self

from valohai_dagster.errors import ConfigurationError, ServiceUnavailable, ValohaiError
from valohai_dagster.plugin.compat import (
    CheckRunHealthResult,
    ConfigurableClass,
    ConfigurableClassData,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from valohai_dagster.plugin.engine_choice import why_not_driven

if TYPE_CHECKING:
    from valohai_dagster.plugin.driver.handing_over import HandingOver

log = logging.getLogger(__name__)


class ValohaiRunLauncher(RunLauncher, ConfigurableClass):
    """Decides from snapshots, so without user code and the same for webserver, daemon and CLI."""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._inner = DefaultRunLauncher()
        self._to_conductor: HandingOver | None = None
        self._opening = threading.Lock()
        super().__init__()

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        return cls(inst_data=inst_data, **config_value)

    def register_instance(self, instance: DagsterInstance) -> None:
        super().register_instance(instance)
        self._inner.register_instance(instance)

    @property
    def _conductor(self) -> HandingOver:
        """Opened at the first run of ours, since a deployment without any needs neither records nor Redis; and anew when
        the settings have changed, as the conductor takes them over too."""
        with self._opening:
            if self._to_conductor is not None and self._to_conductor.is_outdated():
                self._to_conductor.close()
                self._to_conductor = None
            if self._to_conductor is None:
                from valohai_dagster.plugin.driver.handing_over import HandingOver

                self._to_conductor = HandingOver(self._instance)
            return self._to_conductor

    # -- launching ------------------------------------------------------------------------------------------------
    def launch_run(self, context: LaunchRunContext) -> None:
        """Raises `ValohaiError` when a run of ours cannot be handed over; Dagster then shows it as failed."""
        run = context.dagster_run
        if self._instance.is_ephemeral or why_not_driven(self._instance, run) is not None:
            self._inner.launch_run(context)
        else:
            self._conductor.launch(run, context.workspace)

    def resume_run(self, context: ResumeRunContext) -> None:
        """The conductor needs no help to go on; it is told to look again."""
        run = context.dagster_run
        if self._is_driven(run):
            self._conductor.remind(run.run_id)
        elif self._inner.supports_resume_run:
            self._inner.resume_run(context)
        else:
            raise ConfigurationError(
                f"run {run.run_id} is driven by Dagster's own engine, whose default launcher cannot resume a run; "
                "execute it again from failure"
            )

    @property
    def supports_resume_run(self) -> bool:
        return True

    def terminate(self, run_id: str) -> bool:
        """K-54: a soft stop of the run's executions; the run is canceled when they have ended.

        False for a run that has ended or cannot be reached.
        """
        run = self._instance.get_run_by_id(run_id)
        if run is None or not self._is_driven(run):
            return bool(self._inner.terminate(run_id))
        if run.is_finished:
            return False
        if run.status is not DagsterRunStatus.CANCELING:
            self._instance.report_run_canceling(run)
        self._conductor.terminate(run_id)
        return True

    def _is_driven(self, run: DagsterRun) -> bool:
        """By what it is, not by the records: these may be away."""
        return not self._instance.is_ephemeral and why_not_driven(self._instance, run) is None

    def join(self, timeout: int = 30) -> None:
        self._inner.join(timeout)

    def dispose(self) -> None:
        if self._to_conductor is not None:
            self._to_conductor.close()
            self._to_conductor = None
        self._inner.dispose()

    # -- what monitoring asks ---------------------------------------------------------------------------------------
    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """A run of ours has no worker of its own that could die.

        Somebody who cannot be reached now is not dead: what was handed over goes on, here or in another conductor. So
        the answer is RUNNING, with the reason in words, until the run's end is recorded (DAGSTER_NOTES 8).
        """
        if not self._is_driven(run):
            return self._health_of_process(run)
        try:
            ended = self._conductor.has_ended(run.run_id)
            text = "its end is recorded" if ended else self._conductor.explain(run)
            status = WorkerStatus.SUCCESS if ended else WorkerStatus.RUNNING
        except (ValohaiError, ServiceUnavailable, *self._conductor_outages()) as error:
            status = WorkerStatus.RUNNING
            text = f"the conductor's records cannot be read now, which says nothing of the run: {error}"
        return CheckRunHealthResult(status, text)

    def _health_of_process(self, run: DagsterRun) -> CheckRunHealthResult:
        if self._inner.supports_check_run_worker_health:
            return self._inner.check_run_worker_health(run)
        text = "Dagster's default launcher cannot be asked about its processes"
        return CheckRunHealthResult(WorkerStatus.RUNNING, text)

    def get_run_worker_debug_info(
        self, run: DagsterRun, include_container_logs: bool | None = True
    ) -> str | None:
        """What the run waits for or does, in words."""
        if not self._is_driven(run):
            return self._inner.get_run_worker_debug_info(run, include_container_logs)
        try:
            return self._conductor.explain(run)
        except (ValohaiError, *self._conductor_outages()) as error:
            return f"the conductor's records cannot be read now: {error}"

    @staticmethod
    def _conductor_outages() -> tuple[type[Exception], ...]:
        import redis
        from sqlalchemy.exc import SQLAlchemyError

        return (redis.RedisError, SQLAlchemyError, OSError)
