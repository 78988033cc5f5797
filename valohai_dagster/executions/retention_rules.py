"""What may go, and why something stays. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from valohai_dagster.settings_retention import RetentionSettings

Kind = Literal["outputs", "logs", "metadata", "code", "events"]
KINDS: tuple[Kind, ...] = ("outputs", "logs", "metadata", "code", "events")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The execution that a thing belongs to."""

    id: str
    project: str
    ended_at: datetime | None  # None while it has not ended
    tags: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output, and everything that may keep it."""

    owner: Owner
    readers: Sequence[Owner] = ()
    named_readers: frozenset[str] = (
        frozenset()
    )  # ids of readers that made something kept by its name
    aliased: bool = False
    tagged: bool = False
    in_dataset: bool = False
    in_model: bool = False


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that goes. `id` names it for the executor."""

    kind: Kind
    id: str
    project: str
    bytes: int
    name: str
    why: str


@dataclass(kw_only=True)
class Plan:
    """What goes now, what was looked at and stays, and where the next look goes on."""

    items: list[Item] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)  # reason -> things
    cursors: dict[str, str] = field(default_factory=dict)  # of the kinds with more to look at
    counts: Counter[str] = field(default_factory=Counter)  # of the items by kind

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.counts[item.kind] += 1

    def of(self, kind: Kind) -> list[Item]:
        return [item for item in self.items if item.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kinds": {
                kind: {"count": len(found), "bytes": sum(item.bytes for item in found)}
                for kind in KINDS
                if (found := self.of(kind))
            },
            "kept": dict(self.kept),
            "more": bool(self.cursors),
            "items": [
                {
                    name: getattr(item, name)
                    for name in ("kind", "id", "project", "name", "bytes", "why")
                }
                for item in self.items
            ],
        }


def cutoff(
    policy: RetentionSettings, kind: str, project: str | None, now: datetime
) -> datetime | None:
    """What ended before it is old; None when nothing of the project ever is."""
    days = policy.days(kind, project)
    return now - timedelta(days=days) if days else None


def is_old(policy: RetentionSettings, kind: str, owner: Owner, now: datetime) -> bool:
    limit = cutoff(policy, kind, owner.project, now)
    return limit is not None and owner.ended_at is not None and owner.ended_at < limit


def why_owner_keeps(
    policy: RetentionSettings, kind: str, owner: Owner, now: datetime
) -> str | None:
    """Why something of this execution stays whatever it is; None when it may go."""
    if not is_old(policy, kind, owner, now):
        return "not old enough"
    found = sorted(set(owner.tags) & set(policy.keep_tags))
    return f"its execution has the tag {found[0]}" if found else None


def why_output_stays(policy: RetentionSettings, output: Output, now: datetime) -> str | None:
    """None when its content may go. What a running execution reads always stays."""
    if reason := why_owner_keeps(policy, "outputs", output.owner, now):
        return reason
    if any(reader.ended_at is None for reader in output.readers):
        return "an execution that has not ended reads it"
    reasons = (
        (policy.keep_aliased and output.aliased, "an alias names it"),
        (policy.keep_tagged and output.tagged, "it has a tag"),
        (policy.keep_in_datasets and output.in_dataset, "it is in a dataset version"),
        (policy.keep_in_models and output.in_model, "it is in a model version"),
        (policy.keep_used and _used_by_kept(policy, output, now), "a kept execution has read it"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _used_by_kept(policy: RetentionSettings, output: Output, now: datetime) -> bool:
    return any(
        reader.id in output.named_readers
        or why_owner_keeps(policy, "outputs", reader, now) is not None
        for reader in output.readers
    )


def age_text(policy: RetentionSettings, kind: str, owner: Owner, now: datetime) -> str:
    """Why it goes, for people."""
    assert owner.ended_at is not None
    days = policy.days(kind, owner.project)
    return (
        f"its execution ended {(now - owner.ended_at).days} days ago, {kind} are kept for {days:g}"
    )
