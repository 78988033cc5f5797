"""Retention: removes what the settings under [retention] no longer keep, a batch an hour."""

from __future__ import annotations

from valohai_dagster import build_retention_sensor

retention = build_retention_sensor()
