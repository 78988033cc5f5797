"""The run driver: Dagster runs whose every step is an execution, followed by one process for all of them.

`driver.py` takes runs and watches over them, `run.py` is one run, `step.py` one try of one step, `events.py` what
is written of it, `lanes.py` how it is written, `recovery.py` how another process goes on.
"""
