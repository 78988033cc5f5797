"""The conductor's log as text and as JSON."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from valohai_dagster import telemetry
from valohai_dagster.observability.logs import set_up_logging
from valohai_dagster.observability.prometheus import Metrics


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def logged(form: str) -> list[str]:
    stream = io.StringIO()
    set_up_logging(form, stream=stream)  # pyright: ignore[reportArgumentType]
    log = logging.getLogger("valohai_dagster.x")
    log.info("queued %s", "e1", extra={"action": "queue", "execution": "e1", "run": "r1"})
    log.debug("not shown")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    return stream.getvalue().splitlines()


def test_json_is_one_object_per_line_with_action_and_ids():
    first, second = (json.loads(line) for line in logged("json"))
    assert {**first, "time": ""} == {
        "time": "",
        "level": "info",
        "logger": "valohai_dagster.x",
        "message": "queued e1",
        "action": "queue",
        "execution": "e1",
        "run": "r1",
    }
    assert "two\nlines" in second["exception"]


def test_text_is_for_people():
    assert logged("text")[0].endswith("INFO valohai_dagster.x queued e1")


def test_warnings_of_libraries_are_lines_too():
    stream = io.StringIO()
    set_up_logging("json", stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", stacklevel=1)
    assert "old" in json.loads(stream.getvalue())["message"]


def test_outages_are_counted_by_what_waits():
    metrics = Metrics()
    set_up_logging("text", stream=io.StringIO())
    with telemetry.listening(metrics):
        logging.getLogger("x").warning("waits", extra={"action": "outage", "step": "reports"})
        logging.getLogger("x").warning("else", extra={"action": "requeue"})
    assert 'valohai_outages_total{step="reports"} 1.0' in metrics.render([]).decode()
