"""Settings of groups changed at run time."""

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import pytest

from valohai_dagster.capacity.overrides import (
    changeable,
    effective,
    fitted,
    read_overrides,
    with_overrides,
    write_overrides,
)
from valohai_dagster.errors import RefusedError
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import LocalGroupSettings, SimulatedGroupSettings

NOW = datetime(2026, 5, 4, tzinfo=timezone.utc)
GROUP = SimulatedGroupSettings(kind="simulated", min_machines=1, price_per_hour=Decimal("2.5"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "state")


def test_e01_what_was_changed_counts_over_the_file_until_it_is_taken_back(settings: Settings):
    records = open_records(settings)
    try:
        with records.write() as conn:
            assert effective(conn, "gpu", GROUP) == GROUP
            values = {"max_machines": 9, "price_per_hour": Decimal("0.1"), "team_quotas": {"a": 2}}
            write_overrides(conn, "gpu", values, NOW)
        with records.read() as conn:
            now = effective(conn, "gpu", GROUP)
            assert (now.max_machines, now.price_per_hour) == (9, Decimal("0.1"))
            assert (now.min_machines, now.team_quotas) == (1, {"a": 2})
            assert effective(conn, "other", GROUP) == GROUP
        with records.write() as conn:
            write_overrides(conn, "gpu", {}, NOW)
            assert read_overrides(conn, "gpu") == {}
            assert effective(conn, "gpu", GROUP) == GROUP
    finally:
        records.close()


def test_a_change_that_the_file_has_made_impossible_does_not_count_and_all_others_do(
    settings: Settings,
):
    records = open_records(settings)
    try:
        with records.write() as conn:
            values = {"enabled": False, "max_machines": 0, "owner": "user:ann"}
            write_overrides(conn, "gpu", values, NOW)
            now = effective(conn, "gpu", GROUP)
            assert (now.enabled, now.max_machines, now.owner) == (False, 5, "user:ann")
    finally:
        records.close()


def test_why_changes_do_not_count_is_told_and_one_may_need_another():
    values = {"min_machines": 8, "max_machines": 9, "price_per_hour": -1, "image": "x"}
    now, refused = fitted("gpu", GROUP, values)
    assert (now.min_machines, now.max_machines, now.price_per_hour) == (8, 9, Decimal("2.5"))
    assert list(refused) == ["price_per_hour", "image"]
    assert "price_per_hour" in refused["price_per_hour"]
    assert "cannot be changed" in refused["image"]


def test_what_a_group_cannot_change_is_refused_with_what_it_can():
    with pytest.raises(RefusedError, match=r"'region' cannot be changed .* max_machines"):
        with_overrides("gpu", GROUP, {"region": "eu"})
    with pytest.raises(RefusedError, match="min_machines = 1 is more than max_machines = 0"):
        with_overrides("gpu", GROUP, {"max_machines": 0})
    with pytest.raises(RefusedError, match="max_machines"):
        with_overrides("gpu", GROUP, {"max_machines": "many"})


def test_each_kind_changes_what_it_has():
    assert "enabled" in changeable(LocalGroupSettings())
    assert "max_machines" not in changeable(LocalGroupSettings())
    assert "spot" in changeable(GROUP)
