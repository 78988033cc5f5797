"""What a group's settings mean for the planner."""

from __future__ import annotations

from datetime import timedelta

from valohai_dagster.capacity.model import Policy
from valohai_dagster.settings_groups import CloudGroupSettings


def policy_of(group: CloudGroupSettings, *, bootstrap: str | None = None) -> Policy:
    """`bootstrap`: version that new machines are started with; those of others are outdated."""
    return Policy(
        enabled=group.enabled,
        min_machines=group.min_machines,
        max_machines=group.max_machines,
        slots=group.slots * group.agents,
        zones=tuple(group.zones) or ("",),
        spot=group.spot,
        on_demand_fallback=group.on_demand_fallback,
        grace=timedelta(seconds=group.scale_down_grace_seconds),
        stop_when_idle=group.stop_when_idle,
        destroy_after=timedelta(seconds=group.destroy_stopped_after_seconds),
        boot=timedelta(seconds=group.boot_seconds),
        bootstrap=bootstrap,
    )
