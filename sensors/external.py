"""Observation of what steps read from outside the platform, so that assets and automation see when it changes."""

from __future__ import annotations

from valohai_dagster import build_observe_sensor

observe_external = build_observe_sensor()
