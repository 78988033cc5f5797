"""Permissions for inputs: those that have run out are renewed together, and refusals are not asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone

from valohai_agent.input_grants import InputGrants
from valohai_agent.protocol import MAX_GRANT_REQUESTS, Transfer

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
OLD, FRESH = NOW + timedelta(seconds=5), NOW + timedelta(hours=1)


class Rig:
    def __init__(self, granted: Mapping[str, datetime | None], *wanted: str) -> None:
        self.asked: list[list[str]] = []
        self.refused: set[str] = set()
        self.grants = InputGrants(
            {name: Transfer(url=f"http://x/{name}", expires_at=at) for name, at in granted.items()},
            self._renew,
            now=lambda: NOW,
        )
        self.grants.expect(wanted or granted)

    def _renew(self, file_ids: list[str]) -> dict[str, Transfer]:
        self.asked.append(file_ids)
        return {
            name: Transfer(url=f"http://x/{name}?fresh", expires_at=FRESH)
            for name in file_ids
            if name not in self.refused
        }

    def url(self, name: str) -> str | None:
        grant = self.grants.get(name)
        return grant.url if grant else None


def test_one_that_is_good_is_taken_as_it_is() -> None:
    rig = Rig({"a": FRESH, "b": None})
    assert (rig.url("a"), rig.url("b")) == ("http://x/a", "http://x/b")
    assert not rig.asked


def test_all_that_have_run_out_are_asked_for_together() -> None:
    rig = Rig({"a": OLD, "b": FRESH, "c": OLD, "d": OLD}, "a", "b", "c", "d", "missing")
    rig.grants.settle("d")
    assert rig.url("c") == "http://x/c?fresh"
    assert rig.url("a") == "http://x/a?fresh"
    assert rig.url("missing") == "http://x/missing?fresh"
    assert rig.asked == [["c", "a", "missing"]]


def test_no_more_are_asked_for_than_one_report_may_name() -> None:
    rig = Rig({f"{n}": OLD for n in range(1200)})
    for n in range(1200):
        assert rig.url(f"{n}") == f"http://x/{n}?fresh"
    assert [len(one) for one in rig.asked] == [MAX_GRANT_REQUESTS, MAX_GRANT_REQUESTS, 200]


def test_what_was_refused_is_not_asked_for_with_every_file() -> None:
    rig = Rig({}, "a", "b")
    rig.refused = {"a", "b"}
    assert [rig.url("a"), rig.url("b"), rig.url("a")] == [None, None, None]
    assert len(rig.asked) == 1


def test_one_that_was_denied_is_replaced_once_for_all_who_use_it() -> None:
    rig = Rig({"a": FRESH})
    denied = rig.grants.get("a")
    assert denied is not None
    first, second = rig.grants.another("a", denied), rig.grants.another("a", denied)
    assert first is second
    assert first is not None
    assert first.url == "http://x/a?fresh"
    assert rig.asked == [["a"]]
