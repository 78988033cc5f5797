"""Short questions to what was observed of a side."""

from __future__ import annotations

from tests.support.observed_runs import Observed


def kinds(seen: Observed, step: str | None = None, run: int = 0) -> list[str]:
    """Types of a run's events, of one step if it is named."""
    events = [event for event in seen.runs[run]["events"] if event["dagster_event"]]
    return [
        event["dagster_event"]["event_type_value"]
        for event in events
        if step is None or event["step_key"] == f"digits__{step}"
    ]


def status(seen: Observed, run: int = 0) -> str:
    return seen.runs[run]["run"]["status"]["__enum__"].rpartition(".")[2]


def stale(seen: Observed) -> dict[str, str]:
    """Step -> FRESH, STALE or MISSING."""
    return {key.rpartition("/")[2]: asset["status"] for key, asset in seen.assets.items()}
