"""How commands write things for people."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from valohai_agent.protocol import PhaseSpan
from valohai_dagster.cli import render
from valohai_dagster.executions.stream import ExecutionStatus, ExecutionView
from valohai_dagster.executions.timing import phase_seconds

NOON = datetime(2026, 1, 5, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (70591, "70.6 kB"), (5_000_000, "5.0 MB"), (None, "?")],
)
def test_sizes_are_decimal_as_in_the_logs(size: int | None, text: str) -> None:
    assert render.size_text(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["a", None, 3], "a, -, 3"),
        ({"k": [True, None]}, '{"k": [true, null]}'),
        ([{"k": "ä"}], '[{"k": "ä"}]'),
        (True, "yes"),
        (None, "-"),
        (2.5, "2.5"),
    ],
)
def test_values_are_written_without_marks_of_python(value: object, text: str) -> None:
    assert render.cell_text(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 files"), (1, "1 file"), (2000, "2,000 files")])
def test_one_is_no_plural(count: int, text: str) -> None:
    assert render.counted(count, "file") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (63.2, "1 min 3 s"), (3725, "1 h 2 min"), (None, "-")]
)
def test_durations_name_their_units(seconds: float | None, text: str) -> None:
    assert render.seconds_text(seconds) == text


def test_metrics_leave_out_nested_values_and_our_own_time() -> None:
    values = {"_time": "x", "loss": 0.123456789, "epoch": 3, "matrix": [[1]], "who": "me"}
    assert render.metrics_text(values) == "loss=0.12346 epoch=3 who=me"


def test_columns_are_aligned_and_never_cut() -> None:
    rows = [["a", "1 B", "x" * 200], ["bcd", "10 B", "y"]]
    first, second = render.in_columns(rows, right=frozenset({1}))
    assert first == "a     1 B  " + "x" * 200
    assert second == "bcd  10 B  y"
    assert render.in_columns([]) == []


def test_queued_is_the_time_before_the_first_phase_and_phases_are_their_own_spans() -> None:
    def at(seconds: float) -> datetime:
        return NOON + timedelta(seconds=seconds)

    view = ExecutionView(
        id="e",
        counter=1,
        project="p",
        project_id="pid",
        step="s",
        commit="c",
        image="i",
        status=ExecutionStatus.complete,
        environment="local",
        ctime=at(0),
        qtime=at(1),
        ended_at=at(20),
        phases=[
            PhaseSpan(phase="preparing", started_at=at(5), ended_at=at(6)),
            PhaseSpan(phase="running", started_at=at(6), ended_at=at(18)),
        ],
    )
    spent = phase_seconds(view)
    assert (spent["queued"], spent["preparing"], spent["running"], spent["pulling"]) == (
        4,
        1,
        12,
        0,
    )
    assert render.total_seconds(view) == 20
