"""The comparison of engine and conductor sees what it must see: a comparison that finds nothing proves nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.integration.plugin.driver.exclusions import IN_PROCESS, MULTIPROCESS
from tests.support.observed_runs import Observed, Plain, differences


def event(step: str | None, kind: str) -> dict[str, Any]:
    return {"step_key": step, "dagster_event": {"event_type_value": kind, "message": "words"}}


EVENTS = [
    event(None, "PIPELINE_START"),
    event("left", "STEP_START"),
    event("right", "STEP_START"),
    event("left", "STEP_SUCCESS"),
    event("right", "STEP_SUCCESS"),
]
ASSET = {
    "status": "FRESH",
    "last_run": "run-1",
    "materializations": [["run-1"]],
    "tags": [{"a": "1"}],
}


def observed(events: list[dict[str, Any]] = EVENTS, **asset: Any) -> Observed:
    assets = {"digits/left": {**ASSET, **asset}}
    return Observed(runs=[{"events": events, "status": "SUCCESS"}], assets=assets, checks={})


def swapped(first: int, second: int) -> list[dict[str, Any]]:
    events = list(EVENTS)
    events[first], events[second] = events[second], events[first]
    return events


def reworded() -> list[dict[str, Any]]:
    events = copy.deepcopy(EVENTS)
    events[1]["dagster_event"]["message"] = "other words"
    return events


def test_the_same_is_the_same() -> None:
    assert differences(observed(), observed()) == ""


@pytest.mark.parametrize(
    "other",
    [
        observed(EVENTS[:-1]),
        observed([*EVENTS, EVENTS[-1]]),
        observed(reworded()),
        observed(swapped(1, 3)),
        observed(status="STALE"),
        observed(tags=[{"a": "2"}]),
    ],
    ids=["missing", "twice", "other words", "other order", "staleness", "tags"],
)
@pytest.mark.parametrize("at_once", ["", "steps", "runs"])
def test_whatever_differs_is_told(other: Observed, at_once: Any) -> None:
    assert differences(observed(), other, at_once=at_once)


def test_steps_at_once_may_come_in_any_order_and_only_they() -> None:
    other = observed(swapped(2, 3))
    assert differences(observed(), other)
    assert not differences(observed(), other, at_once="steps")


def test_of_runs_at_once_any_may_have_been_the_last() -> None:
    other = observed(last_run="run-2")
    assert differences(observed(), other, at_once="steps")
    assert not differences(observed(), other, at_once="runs")


def entry(label: str) -> dict[str, Any]:
    return {"__class__": "EventMetadataEntry", "label": label, "text": "done in 1m2.5s"}


def test_ids_become_names_and_exclusions_are_left_out() -> None:
    ids = {
        "6c1f": "run-1",
        "#7": "<number>",
        "dagster/input_event_pointer/digits/prep=20": "<the first>",
    }
    plain = Plain(IN_PROCESS, ids)
    data = {
        "text": "run 6c1f took #7, not #77, in 12ms",
        "timestamp": 1.5,
        "dagster/input_event_pointer/digits/prep": "20",
        "entries": [entry("seconds/running"), entry("accuracy")],
    }
    assert plain.of(data) == {
        "text": "run run-1 took <number>, not #77, in <duration>",
        "dagster/input_event_pointer/digits/prep": "<the first>",
        "entries": [{**entry("accuracy"), "text": "done in <duration>"}],
    }


def test_every_exclusion_has_its_reason() -> None:
    for exclusions in (IN_PROCESS, MULTIPROCESS):
        for reasons in (
            exclusions.kinds,
            exclusions.wording,
            exclusions.lines,
            exclusions.fields,
            exclusions.entries,
        ):
            assert all(len(reason) > 5 for reason in reasons.values())
