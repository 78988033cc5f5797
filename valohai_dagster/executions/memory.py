"""What a conductor keeps in memory of the executions of its shards.

Only the records' thread changes it, after the transaction that says the same has been committed. Everything in it is
immutable, so the event loop may look at any time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from valohai_dagster.executions.stream import ExecutionStatus

T = TypeVar("T")

RECENT = 1_000  # executions whose details are kept
RECENT_GRANTS = 5_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Active:
    """An unfinished execution; less than a kilobyte."""

    id: str
    shard: int
    group: str
    status: ExecutionStatus
    attempt: int = 1
    token: str | None = None
    worker: str | None = None
    last_seq: int = 0
    stop_requested: int = 0  # 0 no, 1 soft, 2 hard
    stop_reason: str | None = None
    suspected_at: datetime | None = None
    reclaimed_at: datetime | None = None  # by when its cloud takes the machine of its worker away
    priority: int = 0
    condition: str | None = None  # M-40
    restarts: int = 0  # executions that it continues (L-32)

    @property
    def front(self) -> bool:
        """Whether it waits before all others: it was interrupted by no fault of its own."""
        return self.attempt > 1 or self.restarts > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Details:
    """What never changes once an execution is queued."""

    id: str
    project_id: str
    image: str
    spec: Mapping[str, Any]
    job: Mapping[str, Any]
    sources: bytes | None = field(repr=False)

    @property
    def files(self) -> int:
        """How many input files it has."""
        return sum(len(item["files"]) for item in self.job.get("inputs", ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """How many metadata events an execution has, and the latest value of each name."""

    count: int = 0
    latest: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Permission for one upload that has not been reported yet."""

    upload_id: str
    execution_id: str
    attempt: int
    kind: str
    store: str
    key: str


class Recent(Generic[T]):
    """The values that were used last, at most `size` of them."""

    def __init__(self, size: int = RECENT) -> None:
        self._size = size
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str) -> T | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: str, value: T) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)

    def drop(self, key: str) -> None:
        self._values.pop(key, None)


class Memory:
    def __init__(self) -> None:
        self.active: dict[str, Active] = {}
        self.fences: dict[int, int] = {}  # of our shards, as the records had them when we took them
        self.details: Recent[Details] = Recent()
        self.metrics: Recent[Metrics] = Recent()
        self.grants: Recent[Grant] = Recent(RECENT_GRANTS)
        self.projects: Recent[str] = Recent()  # ids by name
        self.commits: Recent[bool] = Recent()  # `project id/identifier` of those in the records

    def all(self) -> list[Active]:
        """A copy, so that it can be walked through while the memory changes."""
        return list(self.active.values())

    def settle(self, changed: Mapping[str, Active]) -> None:
        """Takes over what a transaction has changed; what has ended or is in another's shard is forgotten."""
        for execution_id, active in changed.items():
            if active.status.final or active.shard not in self.fences:
                self.forget(execution_id)
            else:
                self.active[execution_id] = active

    def take_shards(self, fences: Mapping[int, int], actives: Iterable[Active]) -> None:
        for shard in fences:
            self.drop_shard(shard)
        self.fences.update(fences)
        self.active.update({active.id: active for active in actives})

    def forget(self, execution_id: str) -> None:
        self.active.pop(execution_id, None)
        self.details.drop(execution_id)
        self.metrics.drop(execution_id)

    def drop_shard(self, shard: int) -> None:
        self.fences.pop(shard, None)
        for active in self.all():
            if active.shard == shard:
                self.forget(active.id)
