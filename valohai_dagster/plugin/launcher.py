"""`ValohaiRunLauncher`: the run launcher to name in dagster.yaml.

Today it hands every run to Dagster's default launcher, whose run process submits to the execution service and
follows it; naming it now means that a deployment need not change when the service drives runs itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster import DefaultRunLauncher
from typing_extensions import Self

from valohai_dagster.plugin.compat import (
    CheckRunHealthResult,
    ConfigurableClass,
    ConfigurableClassData,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
)


class ValohaiRunLauncher(RunLauncher, ConfigurableClass):
    """Launches runs through an inner launcher and adds nothing to them yet."""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._inner = DefaultRunLauncher()
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

    def register_instance(self, instance: Any) -> None:
        super().register_instance(instance)
        self._inner.register_instance(instance)

    def launch_run(self, context: LaunchRunContext) -> None:
        self._inner.launch_run(context)

    def terminate(self, run_id: str) -> bool:
        """Interrupts the run's process, which asks the execution service for a soft stop and waits for its end."""
        return bool(self._inner.terminate(run_id))

    def join(self, timeout: int = 30) -> None:
        self._inner.join(timeout)

    def dispose(self) -> None:
        self._inner.dispose()

    @property
    def supports_check_run_worker_health(self) -> bool:
        return self._inner.supports_check_run_worker_health

    def check_run_worker_health(self, run: Any) -> CheckRunHealthResult:
        return self._inner.check_run_worker_health(run)

    def get_run_worker_debug_info(
        self, run: Any, include_container_logs: bool | None = True
    ) -> str | None:
        return self._inner.get_run_worker_debug_info(run, include_container_logs)

    @property
    def supports_resume_run(self) -> bool:
        return self._inner.supports_resume_run

    def resume_run(self, context: ResumeRunContext) -> None:
        self._inner.resume_run(context)
