"""`valohai-dagster cost`, and prices of executions, on a service whose agents the test plays."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import typer
from typer.testing import CliRunner

from tests.support.redis_server import RedisServer
from tests.support.service import RunningService, make_spec, running_service
from valohai_dagster.capacity.book import Known
from valohai_dagster.capacity.machines import MachineRecords
from valohai_dagster.capacity.model import Machine
from valohai_dagster.cli.cost import cost
from valohai_dagster.executions.stream import ExecutionView
from valohai_dagster.plugin.results import metadata_of
from valohai_dagster.records import tables as t
from valohai_dagster.settings import load_settings

TOML = """
default_group = "local"
[groups.local]
kind = "static"
slots = 2
price_per_hour = "3600"
[groups.free]
kind = "static"
"""


@pytest.fixture
def service(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[RunningService]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOHAI_REDIS_URL", redis_server.unix_url)
    Path("valohai.toml").write_text(TOML)
    with running_service(load_settings()) as service:
        yield service


def said(*arguments: str, code: int = 0) -> str:
    app = typer.Typer()
    app.command()(cost)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def told(*arguments: str) -> Any:
    return json.loads(said(*arguments, "--json"))


def run(service: RunningService, redis_server: RedisServer, **values: Any) -> ExecutionView:
    """An execution of 20 seconds, by the records."""
    spec = make_spec(**values)
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    assert lease.wait_grants()
    back = datetime.now(timezone.utc) - timedelta(seconds=20)
    mine = t.attempts.c.execution_id == spec.execution_id
    with service.records.write() as conn:
        conn.execute(t.attempts.update().where(mine).values(leased_at=back))
    lease.finish()
    return ExecutionView.model_validate(service.final(spec.execution_id).data)


def test_l40_an_execution_has_its_price_and_its_materialization_too(
    service: RunningService, redis_server: RedisServer
) -> None:
    """3,600 per hour for two slots: one costs a half per second."""
    view = run(service, redis_server)
    assert view.price is not None
    assert 10 <= view.price < 20
    with service.records.read() as conn:
        assert conn.execute(sa.select(t.executions.c.price)).scalar() == view.price
    assert metadata_of(view)["price"].value == float(view.price)


def test_l40_the_price_that_counts_is_that_of_the_machine_when_it_was_launched(
    service: RunningService, redis_server: RedisServer
) -> None:
    """72 per hour for four slots; the group has two by now."""
    now = datetime.now(timezone.utc)
    paid = Decimal(72)
    book = MachineRecords(service.records, "local", price_per_hour=paid, slots=4, clock=lambda: now)
    since = now - timedelta(minutes=10)
    machine = Machine(id="simulated", created_at=since)
    book.save(Known(machine=machine, listed_at=now, registered_at=since + timedelta(minutes=1)))
    spec = make_spec()
    service.client.submit(spec)
    lease = service.agent(redis_server).take()
    lease.leased()
    lease.wait_grants()
    mine = t.attempts.c.execution_id == spec.execution_id
    values = {"leased_at": now - timedelta(seconds=100), "machine_id": "simulated"}
    with service.records.write() as conn:
        conn.execute(t.attempts.update().where(mine).values(values))
    lease.finish()
    price = service.final(spec.execution_id).data["price"]
    assert Decimal("0.5") <= Decimal(str(price)) < Decimal("0.75")
    (row,) = told()["rows"]
    assert (row["key"], row["executions"]) == ("local", 1)
    assert row["start_up"] == 1.2
    assert row["total"] == pytest.approx(row["work"] + row["start_up"] + row["idle"])
    assert row["total"] == pytest.approx(12, rel=0.05)


def test_without_a_price_nothing_is_said_of_it(
    service: RunningService, redis_server: RedisServer
) -> None:
    Path("valohai.toml").write_text(TOML.replace('price_per_hour = "3600"', ""))
    with running_service(load_settings()) as other:
        spec = make_spec()
        other.client.submit(spec)
        lease = other.agent(redis_server).take()
        lease.leased()
        lease.finish()
        view = ExecutionView.model_validate(other.final(spec.execution_id).data)
    assert view.price is None
    assert "price" not in metadata_of(view)


def test_a51_costs_by_project_user_and_month(
    service: RunningService, redis_server: RedisServer
) -> None:
    view = run(service, redis_server)
    with service.records.write() as conn:
        conn.execute(t.executions.update().values(user_name="ann"))
    assert view.price is not None
    month = f"{datetime.now(timezone.utc):%Y-%m}"
    for by, key in (("project", "digits"), ("user", "ann"), ("team", "(nobody)"), ("month", month)):
        answer = told("--by", by)
        assert [row["key"] for row in answer["rows"]] == [key]
        assert answer["total"]["work"] == pytest.approx(float(view.price), abs=0.01)
    (row,) = csv.DictReader(io.StringIO(said("--csv")))
    assert (row["key"], row["executions"]) == ("local", "1")
    text = said().splitlines()
    assert text[0].split()[:3] == ["GROUP", "EXECUTIONS", "HOURS"]
    assert text[-1].startswith("total")
    assert told("--month", "2020-01")["rows"] == []
    assert told("--group", "free")["rows"] == []


def test_impossible_times_are_refused_in_words() -> None:
    assert "YYYY-MM" in said("--month", "November", code=2)
    assert "before" in said("--since", "2026-02-01", "--until", "2026-01-01", code=2)
    assert "either" in said("--month", "2026-01", "--since", "2026-01-01", code=2)
