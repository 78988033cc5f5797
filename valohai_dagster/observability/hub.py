"""Wires the conductor's parts to metrics and spans."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from valohai_dagster import telemetry
from valohai_dagster.observability.listener import EndListener
from valohai_dagster.observability.prometheus import EXTRA, Metrics
from valohai_dagster.observability.readings import (
    Driven,
    Machines,
    Queues,
    Unfinished,
    readings,
)
from valohai_dagster.observability.spans import open_spans

if TYPE_CHECKING:
    from valohai_dagster.executions.service import ExecutionService

log = logging.getLogger(__name__)


class Hub:
    """Use `observing`."""

    def __init__(self, service: ExecutionService, driver: Callable[[], Driven | None]) -> None:
        self._service, self._driver = service, driver
        self.metrics = _open_metrics()

    @property
    def groups(self) -> Collection[str]:
        return self._service.settings.groups

    @property
    def queues(self) -> Queues:
        return self._service.dispatch

    @property
    def shards_held(self) -> int:
        return len(self._service.shards.held)

    @property
    def driver(self) -> Driven | None:
        return self._driver()

    def machines(self) -> Mapping[str, Machines]:
        return self._service.capacity.states()

    def unfinished(self) -> Collection[Unfinished]:
        return self._service.memory.all()

    async def render(self) -> bytes | None:
        """The page `/metrics`; None without the extra."""
        if self.metrics is None:
            return None
        return self.metrics.render(await readings(self))


@contextlib.contextmanager
def observing(
    service: ExecutionService, driver: Callable[[], Driven | None] = lambda: None
) -> Iterator[Hub]:
    """While it lasts, numbers are collected and spans of ended executions are sent."""
    spans = open_spans(service.settings, deployment=service.records.deployment_id)
    hub = Hub(service, driver)
    service.listen(EndListener(spans))
    with contextlib.ExitStack() as stack:
        if spans is not None:
            stack.callback(spans.close)
        if hub.metrics is not None:
            stack.enter_context(telemetry.listening(hub.metrics))
        yield hub


def _open_metrics() -> Metrics | None:
    try:
        return Metrics()
    except ImportError:
        log.debug("no metrics: %s is not installed", EXTRA)
        return None
