"""The reconciler's memory in the records, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
import sqlalchemy as sa

from tests.support.clock import FakeClock
from valohai_dagster.capacity import machines as module
from valohai_dagster.capacity.book import Kind, Known, Overtaken
from valohai_dagster.capacity.machines import MachineRecords
from valohai_dagster.capacity.model import (
    ActionKind,
    Hold,
    Intent,
    Machine,
    MachineState,
    Purchase,
)
from valohai_dagster.records.capacity_tables import capacity_events, machines
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings


@pytest.fixture(params=["sqlite", "postgres"])
def records(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Records]:
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        settings = settings.model_copy(update={"database_url": url})
    opened = open_records(settings)
    yield opened
    opened.close()


def book(
    records: Records, clock: FakeClock, group: str = "gpu", **values: object
) -> MachineRecords:
    return MachineRecords(records, group, clock=clock, **values)  # type: ignore[arg-type]


def test_everything_comes_back_as_it_was_written(records: Records, clock: FakeClock) -> None:
    now = clock()
    mine = book(records, clock, kind="aws", price_per_hour=Decimal("0.5"))
    known = Known(
        machine=Machine(
            id="i-1",
            zone="a",
            purchase=Purchase.spot,
            state=MachineState.stopped,
            created_at=now,
            token="t",
            bootstrap="1.0",
            reclaimed_at=now,
        ),
        adopted=True,
        listed_at=now,
        orphan_since=now,
        registered_at=now,
        worker_seen_at=now,
        draining_since=now,
        stopped_since=now,
        started_at=now,
        stopped_seconds=1.5,
        missing_since=now,
        reason="why",
    )
    mine.save(known)
    intent = Intent(token="t1", action=ActionKind.terminate, at=now, machine_id="i-1", reason="old")
    mine.intend(intent)
    hold = Hold(zone="a", purchase=None, until=now, reason="none left", failures=2)
    mine.hold(hold)
    mine.hold(replace(hold, failures=3))
    other = book(records, clock)
    assert list(other.machines()) == [known]
    assert list(other.intents()) == [intent]
    assert list(other.holds()) == [replace(hold, failures=3)]
    assert list(book(records, clock, "cpu").machines()) == []
    other.settle("t1", "done")
    other.release("a", None)
    other.save(replace(known, gone_at=now))
    assert (list(mine.machines()), list(mine.intents()), list(mine.holds())) == ([], [], [])


def test_price_and_kind_stay_as_when_the_machine_was_new(
    records: Records, clock: FakeClock
) -> None:
    known = Known(machine=Machine(id="i-1", created_at=clock()), listed_at=clock())
    book(records, clock, kind="aws", price_per_hour=Decimal("0.5"), slots=4).save(known)
    later = book(records, clock, kind="gcp", price_per_hour=Decimal("0.7"), slots=1)
    later.machines()
    later.save(replace(known, reason="why"))
    with records.read() as conn:
        row = conn.execute(sa.select(machines)).one()
    assert (row.kind, row.price_per_hour, row.reason) == ("aws", Decimal("0.5"), "why")
    assert row.slots == 4


@pytest.mark.parametrize(("spot", "price"), [("0.2", "0.2"), ("0", "0"), (None, "0.5")])
def test_l40_spot_machines_have_a_price_of_their_own_if_the_group_has_one(
    records: Records, clock: FakeClock, spot: str | None, price: str
) -> None:
    told = None if spot is None else Decimal(spot)
    mine = book(records, clock, price_per_hour=Decimal("0.5"), spot_price_per_hour=told)
    bought = Machine(id="i-1", created_at=clock())
    mine.save(Known(machine=bought, listed_at=clock()))
    mine.save(Known(machine=replace(bought, id="i-2", purchase=Purchase.spot), listed_at=clock()))
    with records.read() as conn:
        rows = conn.execute(sa.select(machines).order_by(machines.c.machine_id))
        assert [row.price_per_hour for row in rows] == [Decimal("0.5"), Decimal(price)]


def test_who_has_read_before_somebody_else_wrote_is_overtaken(
    records: Records, clock: FakeClock
) -> None:
    one, two = book(records, clock), book(records, clock)
    known = Known(machine=Machine(id="i-1", created_at=clock()), listed_at=clock())
    intent = Intent(token="t1", action=ActionKind.launch, at=clock())
    one.machines()
    two.machines()
    two.save(known)
    with pytest.raises(Overtaken, match="'gpu'"):
        one.intend(intent)
    with pytest.raises(Overtaken):
        one.save(replace(known, reason="stale"))
    two.intend(intent)  # its own writes do not count
    one.machines()
    one.intend(replace(intent, token="t2"))
    assert [each.token for each in two.intents()] == ["t1", "t2"]
    assert two.machines()[0].reason is None


def test_history_is_trimmed(
    records: Records, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINES_KEPT", 3)
    monkeypatch.setattr(module, "_TRIM_EVERY", 1)
    mine, other = book(records, clock), book(records, clock, "cpu")
    other.note(Kind.decision, "long ago")
    for number in range(5):
        clock.advance(1.0)
        mine.note(Kind.decision, str(number), machine_id="i-1")

    def texts() -> list[str]:
        with records.read() as conn:
            query = sa.select(capacity_events.c.text).order_by(capacity_events.c.id)
            return list(conn.execute(query).scalars())

    assert texts() == ["long ago", "2", "3", "4"]
    clock.advance(timedelta(days=100).total_seconds())
    other.note(Kind.decision, "now")
    assert texts() == ["2", "3", "4", "now"]


def test_machines_that_are_done_with_are_known_for_a_while(
    records: Records, clock: FakeClock
) -> None:
    mine, now = book(records, clock), clock()
    known = Known(machine=Machine(id="i-1", created_at=now), listed_at=now)
    mine.machines()
    mine.save(known, replace(known, machine=replace(known.machine, id="i-2"), gone_at=now))
    assert mine.gone_since(now - timedelta(days=1)) == {"i-2": now}
    assert mine.gone_since(now) == {}
    assert book(records, clock, "other").gone_since(now - timedelta(days=1)) == {}
