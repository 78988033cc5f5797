"""What the answers of metadata services mean, and how the time that is left is divided."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from valohai_agent.metadata_service import Cloud, cloud_of_host
from valohai_agent.preemption import Notice, aws_notice, azure_notice, google_notice
from valohai_agent.runtimes.base import ExitStatus
from valohai_agent.stopping import Cause, Patience, StopSequence, patience_within
from valohai_agent.verdict import Observed, judge

NOW = datetime(2026, 1, 1, 8, 20, tzinfo=timezone.utc)


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_l30_aws_says_when_a_spot_machine_goes(action: str) -> None:
    notice = aws_notice(json.dumps({"action": action, "time": "2026-01-01T08:22:00Z"}))
    assert notice is not None
    assert notice.seconds_left(NOW) == 120
    assert action in notice.what


@pytest.mark.parametrize("answer", [None, "", "<html>", "[]", '{"action": "none"}'])
def test_other_answers_of_aws_are_no_notice(answer: str | None) -> None:
    assert aws_notice(answer) is None


def test_l30_google_gives_30_seconds_and_machines_with_gpus_an_hour() -> None:
    reclaim = google_notice("TRUE", "NONE", NOW, gpus=True)
    maintenance = google_notice("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", NOW, gpus=True)
    assert reclaim is not None
    assert reclaim.seconds_left(NOW) == 30
    assert maintenance is not None
    assert maintenance.seconds_to_interrupt(NOW) == 3600 - 180
    assert google_notice("FALSE", "MIGRATE_ON_HOST_MAINTENANCE", NOW, gpus=True) is None
    assert google_notice(None, None, NOW, gpus=True) is None


def test_l30_google_gives_60_seconds_before_maintenance_of_machines_without_gpus() -> None:
    maintenance = google_notice("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", NOW, gpus=False)
    assert maintenance is not None
    assert maintenance.seconds_left(NOW) == 60
    assert maintenance.seconds_to_interrupt(NOW) == 0


def azure_event(kind: str, *machines: str, **values: str) -> dict[str, object]:
    return {"EventId": "e1", "EventType": kind, "Resources": list(machines), **values}


def test_l30_azure_names_the_machine_the_time_and_what_to_acknowledge() -> None:
    event = azure_event("Preempt", "vm_3", NotBefore="Thu, 01 Jan 2026 08:20:40 GMT")
    notice = azure_notice(json.dumps({"Events": [event]}), "vm_3")
    assert notice is not None
    assert notice.seconds_left(NOW) == 40
    assert notice.event == "e1"


def test_an_event_of_azure_that_has_begun_has_no_time_left_that_is_known() -> None:
    notice = azure_notice(
        json.dumps({"Events": [azure_event("Reboot", "vm_3", NotBefore="")]}), "vm_3"
    )
    assert notice is not None
    assert notice.seconds_left(NOW) is None
    assert notice.seconds_to_interrupt(NOW) == 0


@pytest.mark.parametrize(
    "event", [azure_event("Freeze", "vm_3"), azure_event("Preempt", "vm_4"), azure_event("Preempt")]
)
def test_events_of_other_machines_and_short_pauses_are_no_notice(event: dict[str, object]) -> None:
    assert azure_notice(json.dumps({"Events": [event]}), "vm_3") is None


def test_k53_the_time_that_is_left_is_divided_between_the_command_and_its_outputs() -> None:
    sequence = StopSequence()
    sequence.begin(Cause.preempted, 0, patience_within(40, Patience()))
    sent = []
    for second in range(41):
        while (name := sequence.due(second)) is not None:
            sent.append((second, name))
    assert sent == [(0, "SIGINT"), (20, "SIGTERM"), (30, "SIGKILL")]


@pytest.mark.parametrize("before", [Cause.user, Cause.preempted])
def test_k53_a_stop_that_goes_on_already_is_hurried_when_less_time_is_left(before: Cause) -> None:
    sequence = StopSequence()
    sequence.begin(before, 0, Patience())
    assert sequence.due(0) == "SIGINT"
    assert not sequence.begin(Cause.preempted, 10, patience_within(40, Patience()))
    sent = []
    for second in range(60):
        while (name := sequence.due(second)) is not None:
            sent.append((second, name))
    assert sent == [(30, "SIGTERM"), (40, "SIGKILL")]
    assert sequence.cause is before
    assert sequence.hopeless(46)


def test_a_stop_that_goes_on_already_is_not_drawn_out() -> None:
    sequence = StopSequence()
    sequence.begin(Cause.preempted, 0, patience_within(40, Patience()))
    sequence.begin(Cause.preempted, 1, Patience())
    assert [sequence.due(30) for _ in range(3)] == ["SIGINT", "SIGTERM", "SIGKILL"]


@pytest.mark.parametrize(
    ("first", "second", "replaces"),
    [
        (Notice(what="x", gone_at=NOW + timedelta(hours=1)), Notice(what="x", gone_at=NOW), True),
        (Notice(what="x", gone_at=NOW), Notice(what="x", gone_at=NOW + timedelta(1)), False),
        (Notice(what="x", gone_at=NOW), Notice(what="x", gone_at=NOW), False),
        (Notice(what="x", gone_at=NOW), Notice(what="x"), True),
        (Notice(what="x"), Notice(what="x", gone_at=NOW), False),
        (Notice(what="x"), Notice(what="x"), False),
        (Notice(what="x", event="1"), Notice(what="x", gone_at=NOW, event="2"), True),
    ],
)
def test_a_notice_replaces_one_of_a_later_time_or_of_another_event(
    first: Notice, second: Notice, replaces: bool
) -> None:
    assert second.replaces(first) is replaces


def test_k54_much_time_makes_nobody_wait_longer_than_usual() -> None:
    assert patience_within(None, Patience()) == patience_within(3600, Patience()) == Patience()


@pytest.mark.parametrize("code", [0, 1, 130])
def test_a_command_that_was_cut_short_is_never_complete(code: int) -> None:
    seen = Observed(exit=ExitStatus(code=code), cause=Cause.preempted, reclaimed="AWS reclaims it")
    verdict = judge(seen)
    assert (verdict.outcome.value, verdict.preempted) == ("error", True)
    assert str(verdict.reason).startswith("AWS reclaims it")


def test_a_users_stop_counts_as_such_on_a_machine_that_goes_away() -> None:
    verdict = judge(Observed(exit=ExitStatus(code=130), cause=Cause.user, reclaimed="AWS"))
    assert (verdict.outcome.value, verdict.preempted) == ("stopped", False)


@pytest.mark.parametrize(
    ("files", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2\n"}, Cloud.aws),
        (
            {"sys_vendor": "Xen", "product_name": "HVM domU", "bios_version": "4.11.amazon\n"},
            Cloud.aws,
        ),
        ({"sys_vendor": "Xen", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef\n"}, Cloud.aws),
        ({"sys_vendor": "Xen", "product_name": "HVM domU", "bios_version": "4.17.2"}, None),
        ({"sys_vendor": "Google\n", "product_name": "Google Compute Engine"}, Cloud.gcp),
        (
            {
                "sys_vendor": "Microsoft Corporation",
                "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n",
            },
            Cloud.azure,
        ),
        ({"sys_vendor": "Microsoft Corporation"}, None),
        ({}, None),
    ],
)
def test_the_firmware_tells_the_cloud(
    tmp_path: Path, files: dict[str, str], cloud: Cloud | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cloud_of_host(tmp_path, tmp_path / "uuid") is cloud


def test_a_notice_far_ahead_lets_commands_go_on_for_a_while() -> None:
    notice = Notice(what="x", gone_at=NOW + timedelta(minutes=10))
    assert notice.seconds_to_interrupt(NOW) == 420
    assert notice.seconds_to_interrupt(NOW + timedelta(minutes=8)) == 0
