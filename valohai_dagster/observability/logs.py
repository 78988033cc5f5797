"""The conductor's own log: text for people, or one JSON object per line."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

from valohai_agent.json_logging import JsonFormatter
from valohai_dagster import telemetry
from valohai_dagster.telemetry import Count

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class OutageCounter(logging.Handler):
    """Counts what waits for a server that is away; whoever waits says so in the log with `action: outage`."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "action", None) == "outage":
            telemetry.count(Count.outages, step=str(getattr(record, "step", record.name)))


def set_up_logging(form: Literal["text", "json"], *, stream: TextIO | None = None) -> None:
    """Everything from level INFO, Python's warnings included, to standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler, OutageCounter()], force=True)
    logging.captureWarnings(True)
    for library in ("alembic", "azure", "httpx"):  # which tell of every step at INFO
        logging.getLogger(library).setLevel(logging.WARNING)
