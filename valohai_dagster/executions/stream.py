"""What followers of an execution see: the events of its `follow` stream.

The execution service writes them after it has applied the cause to the records, so a follower never knows more
than the records do. A follower that comes late, or comes back, submits again and gets a `snapshot` first.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from valohai_agent.protocol import PhaseSpan


class ExecutionStatus(str, Enum):
    """States of CONTRACT 8.1."""

    created = "created"
    queued = "queued"
    started = "started"
    stopping = "stopping"
    stopping_hard = "stopping_hard"
    stopped = "stopped"
    error = "error"
    crashed = "crashed"
    complete = "complete"

    @property
    def final(self) -> bool:
        return self in _FINAL


_FINAL = {
    ExecutionStatus.stopped,
    ExecutionStatus.error,
    ExecutionStatus.crashed,
    ExecutionStatus.complete,
}


class EventKind(str, Enum):
    snapshot = "snapshot"  # data: ExecutionView; first answer to every submission
    state = "state"  # a change of state worth a line in the event log; data: {status}
    progress = "progress"  # phase progress; data: {phase, done, total}; may be skipped by readers
    metadata = "metadata"  # data: {events: [...], latest: {...}}
    detail = "detail"  # status detail set by user code; data: {status_detail}
    warning = "warning"
    output = "output"  # one datum became visible; data: DatumView
    final = "final"  # data: ExecutionView; nothing follows


class View(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class DatumView(View):
    id: str
    name: str
    size: int
    md5: str | None = None
    sha1: str | None = None
    sha256: str | None = None
    uri: str = Field(description="datum://<id>")
    url: str | None = Field(
        None, description="Durable address that opens the file, served by the execution service."
    )
    metadata: dict[str, Any] = Field(default_factory=dict)


class InputView(View):
    input: str
    name: str
    uri: str
    size: int | None = None
    sha256: str | None = None
    datum_id: str | None = None
    cached: bool | None = None
    version: str | None = Field(
        default=None, description="What its source called this content: ETag, generation."
    )
    asked: str | None = Field(
        default=None, description="The URI that it was found by: an alias, a wildcard."
    )


class AttemptView(View):
    number: int
    worker: str | None = None
    end: str | None = None
    reason: str | None = None


class ExecutionView(View):
    """Everything about an execution that its followers may want, at one moment."""

    id: str
    counter: int
    project: str
    project_id: str
    step: str
    commit: str
    image: str
    status: ExecutionStatus
    status_detail: str | None = None
    reason: str | None = None
    exit_code: int | None = None
    environment: str
    group: str = Field(default="", description="Worker group whose queue it is in.")
    run_id: str | None = None
    step_key: str | None = None
    worker: str | None = None
    host: str | None = None
    runtime: str | None = None
    attempt: int = 1
    attempts: list[AttemptView] = Field(default_factory=list)
    command: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InputView] = Field(default_factory=list)
    outputs: list[DatumView] = Field(default_factory=list)
    latest_metadata: dict[str, Any] = Field(default_factory=dict)
    phases: list[PhaseSpan] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    max_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    cpu_cores_average: float | None = None
    cpu_cores_peak: float | None = None
    gpu_memory_bytes_peak: int | None = None
    gpu_utilization_peak: float | None = Field(
        default=None, description="Of the busiest GPU, 0 to 100."
    )
    ctime: datetime
    qtime: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    price: Decimal | None = Field(
        default=None,
        description="Its time at the price of its machine (L-40); None if that is not known.",
    )
    restarts: int = 0
    restart_of: str | None = Field(
        default=None, description="The execution that was interrupted and that this one continues."
    )
    continued_by: str | None = Field(
        default=None, description="The execution that continues this one (L-32)."
    )


class FollowEvent(View):
    """One entry of the stream, stored as JSON under the field `e`. `message` is one line for people."""

    kind: EventKind
    time: datetime
    reported_at: datetime | None = Field(
        default=None, description="When the agent reported what it tells, on our clock."
    )
    attempt: int = 1
    message: str = ""
    data: dict[str, Any] = Field(default_factory=dict)
    view: ExecutionView | None = Field(
        default=None,
        exclude=True,
        description="What `data` holds of a snapshot or an end, for listeners in the same process.",
    )
