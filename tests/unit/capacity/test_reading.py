"""How a machine stands and what it has cost, in a word and a number."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest

from valohai_dagster.capacity.book import Known
from valohai_dagster.capacity.model import Machine, MachineState
from valohai_dagster.capacity.reading import MachineRow
from valohai_dagster.capacity.standing import state_of

NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=timezone.utc)
EARLIER = NOW - timedelta(hours=2)
KNOWN = Known(machine=Machine(id="m", created_at=EARLIER), listed_at=NOW)
IN = replace(KNOWN, registered_at=EARLIER)


def row(known: Known, price: str | None = "3") -> MachineRow:
    return MachineRow(
        group="gpu", kind="aws", price_per_hour=Decimal(price) if price else None, known=known
    )


@pytest.mark.parametrize(
    ("known", "busy", "word"),
    [
        (KNOWN, None, "starting"),
        (IN, 0, "idle"),
        (IN, 2, "busy"),
        (IN, None, "silent"),
        (replace(IN, draining_since=NOW), 0, "draining"),
        (replace(IN, draining_since=NOW), 1, "busy"),
        (replace(KNOWN, orphan_since=NOW), None, "orphan"),
        (replace(IN, missing_since=NOW), 1, "missing"),
        (replace(IN, missing_since=NOW, gone_at=NOW), None, "gone"),
        (replace(IN, machine=replace(IN.machine, state=MachineState.stopped)), None, "stopped"),
    ],
)
def test_one_word_says_how_a_machine_stands(known: Known, busy: int | None, word: str):
    assert state_of(known, busy) == word


def test_a_machine_costs_while_it_is_there_and_not_stopped():
    assert row(KNOWN).cost(NOW) == 6
    assert row(replace(KNOWN, stopped_seconds=3600.0)).cost(NOW) == 3
    stopped = replace(KNOWN, stopped_since=NOW - timedelta(minutes=30))
    assert row(stopped).cost(NOW) == Decimal("4.5")
    gone = replace(KNOWN, gone_at=EARLIER + timedelta(hours=1))
    assert row(gone).cost(NOW) == 3
    assert row(KNOWN, price=None).cost(NOW) is None
