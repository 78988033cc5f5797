"""Every state of an execution has its words, and a next step where there is one."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from valohai_agent.protocol import Worker
from valohai_dagster.executions.stream import ExecutionStatus as Status
from valohai_dagster.executions.why import Explanation, Facts, explain_execution

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
NOW = NOON + timedelta(minutes=5)
LEASED = {
    "status": Status.started,
    "worker": "w1",
    "host": "gpu-7",
    "leased_at": NOON,
    "lease_worker": "w1",
}


def explain(status: Status = Status.queued, **values: Any) -> Explanation:
    given = {"id": "e1", "label": "digits#12 train", "group": "gpu", "now": NOW, **values}
    return explain_execution(Facts(**{"status": status, **given}))


def worker(**values: Any) -> Worker:
    return Worker(**{"name": "w1", "incarnation": "i", "group": "gpu", **values})


def test_the_one_line_names_the_execution_its_state_and_the_next_step():
    line = str(explain(ahead=0))
    assert line.startswith("digits#12 train: no worker of group gpu has checked in. Next: start")


def test_a_queued_one_tells_who_is_ahead_and_who_has_the_slots():
    found = explain(
        ahead=7,
        workers=(worker(slots=2, busy=2),),
        ahead_of_it=("digits#5 train", "digits#6 eval"),
        on_the_slots=("digits#3 train",),
    )
    assert found.text == "queued behind 7 in group gpu: 2 of 2 slots busy on 1 worker"
    assert found.details == (
        "ahead: digits#5 train, digits#6 eval and 5 others",
        "on the slots: digits#3 train and 1 other",
    )


def test_l10_one_that_waits_for_its_turn_says_what_it_waits_for():
    found = explain(Status.created, reason="waits for its turn: user ann has 2 of 2")
    assert (found.state, found.text) == ("quota", "waits for its turn: user ann has 2 of 2")
    assert "groups set gpu" in str(found.next_step)
    assert explain(Status.created).state == "created"


def test_the_moment_between_queue_and_first_report_is_known():
    assert explain(lease_worker="w1").state == "taken"


def test_a_group_that_is_gone_from_the_settings_is_named():
    found = explain(group_kind="unknown", ahead=0)
    assert found.state == "no-group"
    assert "[groups.gpu]" in str(found.next_step)


def test_one_that_is_nowhere_is_queued_again():
    assert explain(ahead=None).state == "missing"


def test_who_runs_it_where_since_when_and_in_which_phase():
    found = explain(
        **LEASED,
        phase="pulling",
        phase_text="pulling 63 %",
        phase_since=NOON + timedelta(seconds=3),
    )
    assert found.state == "pulling"
    assert found.text == (
        "pulling 63 % since 12:00:03 UTC (4 min), leased by worker w1 on host gpu-7 since 12:00:00 UTC (5 min)"
    )
    assert found.facts["phase"] == "pulling"


def test_before_the_first_phase_it_is_starting():
    found = explain(**LEASED)
    assert (found.state, found.text.split(",")[0]) == ("leased", "starting")


def test_a_silent_worker_is_suspected_until_the_grace_is_over():
    found = explain(**LEASED, suspected_at=NOON + timedelta(minutes=4), lost_grace_seconds=300)
    assert found.state == "suspected"
    assert "suspected lost since 12:04:00 UTC (1 min)" in found.text
    assert "another attempt starts in 4 min" in found.text


def test_earlier_attempts_and_the_commands_own_words_are_told():
    found = explain(**LEASED, attempt=2, losses=("worker w0 was lost",), status_detail="epoch 3")
    assert found.details == (
        "attempt 2; before: worker w0 was lost",
        "the command says: epoch 3",
    )


def test_a_stop_is_followed_hop_by_hop():
    asked = {"status": Status.stopping, "stop_requested": 1, "reason": "terminated"}
    assert "being taken out of the queue" in explain(**asked).text
    sent = explain(**{**LEASED, **asked})
    assert sent.state == "stop-sent"
    assert "has not acknowledged it yet" in sent.text
    heard = explain(**{**LEASED, **asked, "acknowledged": "worker w1 sent SIGINT to the command"})
    assert heard.state == "stop-acknowledged"
    assert "once more" in str(heard.next_step)
    hard = {**asked, "status": Status.stopping_hard, "stop_requested": 2}
    assert explain(**{**LEASED, **hard, "acknowledged": "killed"}).next_step is None


@pytest.mark.parametrize(
    ("values", "text", "has_next"),
    [
        ({"status": Status.complete}, "complete after 5 min", False),
        (
            {"status": Status.error, "reason": "the command failed", "exit_code": 3},
            "failed after 5 min: the command failed (exit code 3)",
            True,
        ),
        (
            {"status": Status.error, "reason": "no such input", "started_at": None},
            "refused: no such input",
            True,
        ),
        ({"status": Status.stopped, "reason": "by you"}, "stopped after 5 min: by you", False),
        (
            {"status": Status.crashed, "reason": "lost 3 times"},
            "crashed after 5 min: lost 3 times",
            True,
        ),
    ],
)
def test_an_ended_one_tells_how_it_ended(values: dict[str, Any], text: str, has_next: bool):
    found = explain(**{"started_at": NOON, "created_at": NOON, "ended_at": NOW, **values})
    assert found.text == text
    assert (found.next_step is not None) is has_next


@pytest.mark.parametrize("status", [s for s in Status if not s.final])
def test_without_a_conductor_that_is_the_first_thing_told(status: Status):
    found = explain(status, conductor="nobody", stop_requested=int("stop" in status.value))
    assert found.state == "no-conductor"
    assert found.text.startswith("no conductor is running")
    assert "valohai-dagster conductor" in str(found.next_step)


def test_a_shard_that_is_being_taken_over_is_a_remark():
    found = explain(**LEASED, conductor="elsewhere", shard=3)
    assert found.state == "leased"
    assert "shard 3" in found.details[0]


def test_while_redis_is_away_the_records_speak():
    found = explain(**LEASED, redis_away="connection refused")
    assert found.state == "no-redis"
    assert "started with worker w1 on host gpu-7" in found.text
    assert "connection refused" in found.text


def test_ended_ones_need_no_conductor():
    assert explain(Status.complete, conductor="nobody").state == "complete"


def test_programs_get_the_same_as_json():
    found = explain(**LEASED, run_id="r1").to_dict()
    assert found["subject"] == "digits#12 train"
    assert found["leased_at"] == NOON.isoformat()
    assert (found["execution"], found["run"]) == ("e1", "r1")


def test_i32_warnings_that_are_kept_are_told_at_any_time():
    assert explain(Status.complete, warnings=("a changed",)).details == ("warning: a changed",)
    found = explain(Status.complete, warnings=tuple("abcdefg"))
    assert found.details[-2:] == ("warning: e", "and 2 more warnings")
