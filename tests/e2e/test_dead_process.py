"""A process of Dagster's that dies takes no execution with it."""

from __future__ import annotations

import os
import re
import signal

import pytest
import sqlalchemy as sa

from tests.e2e.conftest import LOCATION, Deployment
from tests.support.dagster_app import DagsterApp
from tests.support.ports import wait_for
from valohai_dagster.plugin.step_tag import DAGSTER_ENGINE, ENGINE_TAG
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings

pytestmark = pytest.mark.slow


def test_a_retry_joins_the_execution_whose_op_process_was_killed(
    app: DagsterApp, deployment: Deployment
) -> None:
    config = {"ops": {"stubborn__count": {"config": {"parameters": {"steps": 60, "pause": 0.5}}}}}
    tags = {ENGINE_TAG: DAGSTER_ENGINE}  # only Dagster's own engine has such a process
    run_id = app.launch(LOCATION, [["stubborn", "count"]], config=config, tags=tags)
    wait_for(lambda: _says(app, run_id, ": running"), seconds=90, every=0.5, what="the command")
    (pid,) = re.findall(
        r"Capturing logs for process \(pid: (\d+)\)", "\n".join(app.messages(run_id))
    )
    os.kill(int(pid), signal.SIGKILL)
    assert app.finished(run_id).status == "SUCCESS"
    assert _says(app, run_id, "going on with execution")
    records = open_records(Settings(state_dir=deployment.state))
    with records.read() as conn:
        c = t.executions.c
        query = sa.select(c.status, c.attempt, c.retry_number).where(c.run_id == run_id)
        assert [tuple(row) for row in conn.execute(query)] == [("complete", 1, 1)]
    records.close()
    assert app.metadata(run_id, "count")["metrics/step"] == 60


def _says(app: DagsterApp, run_id: str, text: str) -> bool:
    return any(text in message for message in app.messages(run_id))
