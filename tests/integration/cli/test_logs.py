"""`valohai-dagster logs` on real records, a real Redis and a local store."""

from __future__ import annotations

import json

import pytest
import redis
from typer.testing import CliRunner, Result

from tests.integration.plugin.test_compute_logs import NOW, Platform
from valohai_agent.protocol import LogStream
from valohai_dagster.cli.app import app
from valohai_dagster.cli.logs import log_lines
from valohai_dagster.errors import NotFoundError
from valohai_dagster.plugin.log_source import ServiceLogs
from valohai_dagster.records import tables as t
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings

ID = "e1"
REFERENCE = "digits#1"


@pytest.fixture
def platform(
    settings: Settings,
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> Platform:
    monkeypatch.setattr("valohai_dagster.cli.logs.load_settings", lambda: settings)
    records = open_records(settings)
    found = Platform(settings, records, redis_client)
    found.execution()
    return found


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["logs", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_stored_log_of_an_execution(platform: Platform) -> None:
    platform.attempt()
    platform.end(stdout=b"one\ntwo\nno end", stderr=b"[valohai] ready\n")
    assert run(REFERENCE, "--stream", "stdout").stdout == "one\ntwo\nno end\n"
    assert run("latest").stdout == (
        "==> train: execution #1, attempt 1, stdout <==\none\ntwo\nno end\n\n"
        "==> train: execution #1, attempt 1, stderr <==\n[valohai] ready\n"
    )
    (line,) = run(REFERENCE, "--stream", "stderr", "--json").stdout.splitlines()
    assert json.loads(line) == {
        "step": "train",
        "execution": 1,
        "id": ID,
        "attempt": 1,
        "stream": "stderr",
        "line": "[valohai] ready",
    }
    with pytest.raises(NotFoundError, match="no execution fits 'digits#2'"):
        run("digits#2")
    with pytest.raises(NotFoundError, match="it has train"):
        run(REFERENCE, "--step", "evaluate")


def test_every_attempt_is_there_under_its_heading(platform: Platform) -> None:
    for number in (1, 2):
        platform.attempt(number)
    platform.end(1, end="lost", stdout=b"first\n")
    platform.end(2, stdout=b"second\n")
    assert run(REFERENCE, "--stream", "stdout").stdout == (
        "first\n\n==> train: execution #1, attempt 2, stdout <==\nsecond\n"
    )


def test_the_live_log_while_it_runs(platform: Platform) -> None:
    assert "no lines yet; --follow waits" in run(REFERENCE).stderr
    platform.attempt()
    end = platform.line("one", 0)
    platform.line("two", end)
    platform.line("starting", 0, stream=LogStream.status)
    assert run(REFERENCE, "--stream", "stdout").stdout == "one\ntwo\n"
    assert run(REFERENCE, "--stream", "stderr").stdout == "[valohai] starting\n"


def test_following_goes_from_live_to_stored_without_a_gap_to_the_end(
    platform: Platform, settings: Settings
) -> None:
    platform.attempt()
    platform.line("one", 0)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        """What happens between two looks."""
        pauses.append(seconds)
        if len(pauses) == 1:
            platform.line("two", 4)
        else:
            platform.end(stdout=b"one\ntwo\nthree\n")

    reader = ServiceLogs(lambda: settings)
    lines = log_lines(reader, REFERENCE, streams=("stdout",), follow=True, sleep=sleep)
    assert [line.text for line in lines] == ["one", "two", "three"]
    assert len(pauses) == 2
    reader.close()


def test_following_a_run_waits_for_its_later_steps(platform: Platform, settings: Settings) -> None:
    """A conductor drives the run: between two steps every execution so far has ended."""
    platform.attempt()
    platform.end(stdout=b"one\n")
    row = {"run_id": "abcd1234", "instance_id": "i", "shard": 0, "handover": {}, "state": "driving"}
    with platform.records.write() as conn:
        conn.execute(t.executions.update().values(run_id="abcd1234"))
        conn.execute(t.runs.insert().values(**row, ctime=NOW))
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        with platform.records.write() as conn:
            conn.execute(t.runs.update().values(state="ended", ended_at=NOW))

    reader = ServiceLogs(lambda: settings)
    lines = log_lines(reader, "abcd", streams=("stdout",), follow=True, sleep=sleep)
    assert [line.text for line in lines] == ["one"]
    assert len(pauses) == 1
    with platform.records.write() as conn:
        conn.execute(t.runs.update().values(ended_at=None))
    waits = log_lines(reader, "abcd", step="later", follow=True, sleep=sleep)
    with pytest.raises(NotFoundError, match="no step 'later'"):
        list(waits)
    assert len(pauses) == 2, "a step that is not there yet is waited for while the run goes on"
    reader.close()


def test_logs_that_retention_removed_say_so(platform: Platform) -> None:
    platform.attempt()
    platform.end(stdout=b"one\n")
    with platform.records.write() as conn:
        gone = {"stdout": {"removed_at": "2026-02-03T04:05:06"}}
        conn.execute(t.attempts.update().values(logs=gone))
    assert "removed by retention on 2026-02-03" in run(REFERENCE, "--stream", "stdout").stdout
