"""What starts runs here without a person: schedules and sensors.

All are off until somebody switches them on, in the UI under Automation or with `dagster sensor start`.
"""

from __future__ import annotations

from sensors.autoscaling import autoscaling
from sensors.digits import digits_job, digits_nightly, retrain_on_request, train_job
from sensors.external import observe_external
from sensors.retention import retention

JOBS = [digits_job, train_job]
SCHEDULES = [digits_nightly]
SENSORS = [retrain_on_request, observe_external, retention, autoscaling]
