"""Small pure parts of the agent: error classes, sealing, phases, the live window, commands on argv."""

from __future__ import annotations

import json
import logging
from datetime import timedelta

import pytest
import redis
from redis import exceptions
from typer.testing import CliRunner

from tests.support.clock import FakeClock
from valohai_agent import sealing
from valohai_agent.cli import app, default_name
from valohai_agent.json_logging import JsonFormatter
from valohai_agent.live_log import Window
from valohai_agent.phases import PhaseClock, source_words
from valohai_agent.protocol import Grants, LogLine, LogStream, Phase, PhaseChanged, Transfer
from valohai_agent.redis_link import Backoff, is_refusal, is_transient


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (redis.ConnectionError("refused"), True),
        (redis.TimeoutError("slow"), True),
        (exceptions.BusyLoadingError("LOADING"), True),
        (redis.ReadOnlyError("READONLY"), True),
        (redis.ResponseError("Function not found"), True),
        (exceptions.OutOfMemoryError("OOM command not allowed"), True),
        (redis.AuthenticationError("WRONGPASS"), False),
        (exceptions.NoPermissionError("no"), False),
        (redis.ResponseError("WRONGTYPE"), False),
        (ValueError("no"), False),
    ],
)
def test_troubles_are_told_apart(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


def test_a_wrong_password_is_a_refusal() -> None:
    assert is_refusal(redis.AuthenticationError("WRONGPASS"))
    assert not is_refusal(redis.ConnectionError("gone"))


def test_waits_grow_to_their_limit_and_start_again_after_success() -> None:
    backoff = Backoff(first=0.1, longest=5)
    waits = [backoff.seconds() for _ in range(12)]
    assert waits[0] <= 0.1
    assert 3.5 <= waits[-1] <= 5
    backoff.reset()
    assert backoff.seconds() <= 0.1


def test_grants_open_only_with_the_key_of_their_lease() -> None:
    mine, other = sealing.new_private_key(), sealing.new_private_key()
    sealed = sealing.seal_grants(
        Grants(secrets={"TOKEN": "s3cret-value"}), sealing.public_key_of(mine)
    )
    assert b"s3cret-value" not in sealed
    assert sealing.open_grants(sealed, mine).secrets == {"TOKEN": "s3cret-value"}
    with pytest.raises(sealing.CannotOpen):
        sealing.open_grants(sealed, other)
    with pytest.raises(ValueError, match="64 hex digits"):
        sealing.seal_grants(Grants(), "not a key")


def test_phases_follow_each_other_without_gaps(clock: FakeClock) -> None:
    changes: list[PhaseChanged] = []
    phases = PhaseClock(clock, changed=changes.append, progress=changes.append)
    phases.move(1, 2)
    phases.enter(Phase.preparing)
    clock.advance(2)
    phases.enter(Phase.pulling, "pulling image")
    phases.move(63, 100)
    clock.advance(3)
    spans = phases.finish()
    assert [span.phase for span in spans] == ["preparing", "pulling"]
    assert spans[0].ended_at == spans[1].started_at
    assert spans[1].ended_at - spans[1].started_at == timedelta(seconds=3)
    assert [change.message for change in changes] == [None, "pulling image", "pulling 63 %"]


def test_what_is_tried_again_is_the_phases_message_and_the_log_has_some_of_it(
    clock: FakeClock,
) -> None:
    changes: list[PhaseChanged] = []
    said: list[str] = []
    phases = PhaseClock(clock, changed=changes.append, progress=changes.append, log=said.append)
    phases.waits("nobody hears it")
    phases.enter(
        Phase.downloading, source_words([Transfer(url="https://data.example.org/a?sig=x")])
    )
    phases.move(5, 10)
    for _ in range(3):
        phases.waits("f: no connection (try 1 of 8)")
        clock.advance(3)
    assert changes[0].message == "downloading from data.example.org"
    assert changes[-1].message == "downloading, f: no connection (try 1 of 8)"
    assert (changes[-1].done, changes[-1].total) == (5, 10)
    assert said == ["f: no connection (try 1 of 8)"] * 2  # at 0 s and at 6 s
    states = [change.message for change in changes if change.done is None]
    assert states == [changes[0].message, changes[-1].message]  # at 0 s
    clock.advance(30)
    phases.waits("f: no connection (try 3 of 8)")
    assert changes[-2].done is None
    assert (
        changes[-2].message == changes[-1].message == "downloading, f: no connection (try 3 of 8)"
    )
    phases.enter(Phase.running)
    phases.waits("live output waits")
    assert changes[-1].phase is Phase.running
    assert changes[-1].message is None


def test_sources_are_servers_and_not_too_many() -> None:
    assert source_words([Transfer(url="file:///a")]) is None
    many = [Transfer(url=f"http://h{number}/x") for number in range(5)]
    assert source_words(many) == "downloading from h0, h1, h2 and 2 more"


def test_m03_the_live_window_is_bounded_in_lines_and_in_bytes() -> None:
    line = LogLine(s=LogStream.stdout, t="t", m="x" * 900)
    short = Window(lines=3)
    assert [short.add(line) for _ in range(5)] == [1, 2, 3, 3, 3]
    small = Window(lines=1000, limit_bytes=10_000)
    assert max(small.add(line) for _ in range(100)) == 10


def test_made_up_names_differ() -> None:
    assert default_name() != default_name()


def test_json_log_lines_carry_the_action_and_ids() -> None:
    record = logging.makeLogRecord(
        {"msg": "leased %s", "args": ("e1",), "action": "leased", "execution": "e1"}
    )
    entry = json.loads(JsonFormatter().format(record))
    assert (entry["message"], entry["action"], entry["execution"]) == ("leased e1", "leased", "e1")


def test_version_tells_the_protocol_too() -> None:
    result = CliRunner().invoke(app, ["version"])
    assert result.exit_code == 0
    assert "protocol 1..1" in result.output


def test_run_without_a_queue_is_refused() -> None:
    result = CliRunner().invoke(app, ["run", "--redis", "redis://localhost"])
    assert result.exit_code == 2
