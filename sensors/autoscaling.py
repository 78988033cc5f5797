"""What was decided about machines of worker groups, tick by tick, with the reasons."""

from __future__ import annotations

from valohai_dagster import valohai_autoscaling_sensor

autoscaling = valohai_autoscaling_sensor()
