"""Which events become a line of progress."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from tests.support.clock import FakeClock
from valohai_dagster.cli.progress import EventWriter
from valohai_dagster.executions.stream import EventKind, FollowEvent

NOON = datetime(2026, 1, 5, 12, tzinfo=timezone.utc)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def writer(lines: list[str], clock: FakeClock) -> EventWriter:
    return EventWriter(lines.append, monotonic=clock.monotonic)


def event(kind: EventKind, message: str = "", **data: Any) -> FollowEvent:
    return FollowEvent(kind=kind, time=NOON, message=message, data=data)


def test_metrics_come_at_most_once_a_second_and_the_newest_is_not_lost(
    writer: EventWriter, lines: list[str], clock: FakeClock
) -> None:
    for epoch in range(1, 5):
        writer.write(event(EventKind.metadata, latest={"epoch": epoch}))
        clock.advance(0.1)
    writer.write(event(EventKind.state, "uploading"))
    assert lines == ["[cyan]epoch=1[/cyan]", "[cyan]epoch=4[/cyan]", "uploading"]


def test_the_same_words_are_said_once(writer: EventWriter, lines: list[str]) -> None:
    for _ in range(3):
        writer.write(event(EventKind.state, "created"))
    assert lines == ["created"]


def test_words_of_users_are_not_read_as_markup(writer: EventWriter, lines: list[str]) -> None:
    writer.write(event(EventKind.detail, "[red]mine[/red]"))
    assert lines == ["\\[red]mine\\[/red]"]


def test_a_snapshot_is_no_news(writer: EventWriter, lines: list[str]) -> None:
    writer.write(event(EventKind.snapshot, "queued"))
    assert lines == []
