"""The wire contract between the control plane and the worker agents.

Both distributions import this one file. It holds the Redis key layout, the messages and the compatibility
rule; it does no I/O.

Compatibility: every message carries `v`, the protocol version of its writer. A party understands the versions
`MIN_PROTOCOL_VERSION..PROTOCOL_VERSION`; additions that an older reader may ignore (a new optional field, a
new report kind) do not raise the version, everything else does, and the control plane keeps understanding the
version before its own. Readers ignore fields that they do not know. A job is only handed to an agent whose
range contains the job's version, so a mixed fleet drains old jobs instead of failing them.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timezone
from enum import Enum
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL_VERSION = 1
MIN_PROTOCOL_VERSION = 1

LEASE_SECONDS = (
    27.0  # without renewal; with the looks to be sure, 30 s of silence are told as suspected
)
RENEW_SECONDS = LEASE_SECONDS / 3
LIVE_LOG_LINES = 2000  # M-03: the live view shows the last 2,000 lines
LOG_EVENTS_PER_WINDOW = 500  # M-02: 500 events per 10 seconds and stream
LOG_WINDOW_SECONDS = 10.0
MAX_LOG_MESSAGE_BYTES = 64 * 1024  # M-06
MAX_GRANT_REQUESTS = 500  # files named in one `grants-wanted` report
MAX_INPUTS_READY = 200  # files in one `inputs-ready` report
GRANTED_PARTS = 64  # parts of one upload that are granted at once


def speaks(version: int) -> bool:
    """Whether this side understands a message of that version."""
    return MIN_PROTOCOL_VERSION <= version <= PROTOCOL_VERSION


class Keys:
    """Redis keys of one deployment.

    Every key starts with the deployment's id, so that several control planes can share a server. Keys of one
    worker group carry the group as hash tag: they live on one cluster slot and one ACL pattern covers them.
    """

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment

    def _key(self, *parts: str) -> str:
        return ":".join(("vh", self.deployment, *parts))

    # -- one worker group -------------------------------------------------------------------------------------
    def group_prefix(self, group: str) -> str:
        return self._key("{" + group + "}", "")

    def ready(self, group: str) -> str:
        return self.group_prefix(group) + "ready"

    def bell(self, group: str) -> str:
        return self.group_prefix(group) + "bell"

    def job(self, group: str, execution_id: str) -> str:
        return self.group_prefix(group) + f"job:{execution_id}"

    def lease(self, group: str, execution_id: str) -> str:
        return self.group_prefix(group) + f"lease:{execution_id}"

    def grant(self, group: str, execution_id: str) -> str:
        return self.group_prefix(group) + f"grant:{execution_id}"

    def command(self, group: str, worker: str) -> str:
        return self.group_prefix(group) + f"command:{worker}"

    def log(self, group: str, execution_id: str, attempt: int) -> str:
        return self.group_prefix(group) + f"log:{execution_id}:{attempt}"

    def worker(self, group: str, worker: str) -> str:
        return self.group_prefix(group) + f"worker:{worker}"

    def sequence(self, group: str) -> str:
        """Counts the jobs that were queued; makes the queue first in, first out."""
        return self.group_prefix(group) + "sequence"

    def passed(self, group: str) -> str:
        """Hash: how often a waiting job was passed over for one whose inputs the taker had."""
        return self.group_prefix(group) + "passed"

    def sealed(self, group: str, machine_id: str) -> str:
        """There while the machine is about to be ended: its workers get no jobs."""
        return self.group_prefix(group) + f"sealed:{machine_id}"

    def roster(self, group: str) -> str:
        """Set of the names of workers that checked in; names whose entry has expired are removed on reading."""
        return self.group_prefix(group) + "roster"

    def reports(self, group: str, shard: int = 0) -> str:
        return self.group_prefix(group) + f"reports:{shard}"

    # -- the control plane alone ------------------------------------------------------------------------------
    def submissions(self, shard: int) -> str:
        """Stream of hand-overs to the execution service: new executions and stop requests."""
        return self._key("submissions", str(shard))

    def runs(self, shard: int) -> str:
        """Stream of what the run launcher hands over to the run driver."""
        return self._key("runs", str(shard))

    def shard(self, shard: int) -> str:
        """Which conductor holds the shard; expires when it stops renewing."""
        return self._key("shard", str(shard))

    def conductors(self) -> str:
        """Sorted set of the living conductors by the time when their entry is out of date."""
        return self._key("conductors")

    def deaths(self) -> str:
        """Stream of workers that a supervisor has seen die, for every conductor."""
        return self._key("deaths")

    def follow(self, execution_id: str) -> str:
        """Stream of what happened to one execution, for the run driver, op processes and the CLI."""
        return self._key("follow", execution_id)

    def service(self) -> str:
        """Which conductor looks after the local groups; expires when it stops renewing."""
        return self._key("service")

    def supervisor(self, group: str) -> str:
        """Which conductor looks after the machines of a group; expires when it stops renewing."""
        return self._key("supervisor", group)

    def capacity(self, group: str) -> str:
        """How the group's machines stood at the last look, for those who wait for one."""
        return self._key("capacity", group)

    def kicks(self) -> str:
        """Stream of groups whose machines are to be looked at now, for whoever looks after them."""
        return self._key("kicks")

    def launching(self, run_id: str) -> str:
        """Held for a moment by the process that launches a run; see the run coordinator."""
        return self._key("launching", run_id)

    def epoch(self) -> str:
        """Random name of this Redis' memory: it vanishes when Redis is emptied; conductors then reconcile."""
        return self._key("epoch")


READY_FRONT = 0  # requeued after an infrastructure loss
READY_NORMAL = 1
_CLASS = 10**15
_PRIORITY = 10**12


def ready_score(sequence: int, *, priority: int = 0, front: bool = False) -> float:
    """Order of the ready set: class, then priority (higher first, 0..999), then sequence (FIFO, L-13)."""
    rank = 999 - max(0, min(999, priority))
    return float((READY_FRONT if front else READY_NORMAL) * _CLASS + rank * _PRIORITY + sequence)


def priority_of(score: float) -> tuple[int, float]:
    """The priority of a score of the ready set, and the first score beyond its class and priority.

    >>> priority_of(ready_score(17, priority=5)), priority_of(ready_score(1, front=True))
    ((5, 1995000000000000.0), (0, 1000000000000000.0))
    """
    rank = int(score // _PRIORITY)
    return 999 - rank % 1000, float((rank + 1) * _PRIORITY)


def digest(text: str) -> str:
    """Short stable name for a text, for keys that must not hold the text itself."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


MARK_CHARACTERS = 12  # of a content's name in the queue: enough for a preference
MAX_INPUT_MARKS = 24  # of one job's inputs, the largest


def name_digest(name: str) -> str:
    """Stands for a name of a content (`JobFile.content_name`), however long that is."""
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


def content_mark(name: str) -> str:
    """By this a queue compares what jobs want with what workers hold."""
    return name_digest(name)[:MARK_CHARACTERS]


def utcnow() -> datetime:
    return datetime.now(timezone.utc)


class Message(BaseModel):
    """Base of everything on the wire: unknown fields are ignored (see the compatibility rule)."""

    model_config = ConfigDict(extra="ignore", frozen=True)


# ---------------------------------------------------------------------------------------------------------------
# The job: control plane -> agent, no secrets
# ---------------------------------------------------------------------------------------------------------------


class Checksums(Message):
    md5: str | None = None
    sha1: str | None = None
    sha256: str | None = None


class JobFile(Message):
    """One file of an input, already resolved and placed by the control plane."""

    id: str = Field(description="Names the file in grants: unique within the job.")
    name: str = Field(description="Path below /valohai/inputs/<input>/, placed by I-20..I-25.")
    uri: str = Field(
        description="What inputs.json shows: the HTTP URL without credentials, else datum://<id>."
    )
    size: int | None = Field(default=None, description="Bytes, if known.")
    checksums: Checksums = Checksums()
    datum_id: str | None = None
    metadata: list[dict[str, Any]] = Field(
        default_factory=list, description="The datum's metadata (K-33)."
    )
    cache_key: str | None = Field(
        default=None,
        description="Identity of the content, if known: `sha256:<hex>`, or `<uri>@<version>` of an object of a store. "
        "Without it the agent asks the server (ETag).",
    )

    @property
    def content_name(self) -> str | None:
        """Under what caches know the content, if that can be told without asking anybody."""
        if self.checksums.sha256:
            return f"sha256:{self.checksums.sha256.lower()}"
        if self.cache_key:
            return self.cache_key
        return f"datum:{self.datum_id}" if self.datum_id else None


class JobInput(Message):
    name: str
    input_id: str = Field(description="What `input_request` takes (K-34).")
    files: list[JobFile] = Field(default_factory=list)
    download: Literal["always", "on-demand"] = "always"


class JobPackage(Message):
    """An uncompressed tar with files of a dataset version (O-23); a member has its datum's id as its name.

    The files are inputs of their own all the same: an agent may fetch each of them singly.
    """

    id: str = Field(description="Names the package in grants: unique within the job.")
    uri: str = Field(description="What messages call it.")
    size: int
    checksums: Checksums
    files: list[str] = Field(description="JobFile.id of the job's files that are in it.")


class JobMount(Message):
    source: str
    destination: str
    readonly: bool = False
    type: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class RemoteDebug(Message):
    """An SSH server beside the command (K-60)."""

    port: int = Field(description="Of the worker, above 1023.")
    key: str = Field(
        description="The one public key that is let in, as in authorized_keys: `ssh-ed25519 AAAA...`."
    )


class Job(Message):
    """All that an agent needs to know before it has the lease. Never a secret, never a signed URL."""

    v: int = PROTOCOL_VERSION
    execution_id: str
    attempt: int = 1
    group: str
    shard: int = 0
    run_id: str | None = None
    step_key: str | None = None
    project_id: str
    project_name: str
    step: str
    commit: str
    archive_sha256: str = Field(
        description="sha256 of the gzip tarball of the commit's tree; verified on unpack."
    )
    image: str
    commands: list[str] = Field(description="Interpolated command items (C-01..C-13).")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Typed values, nulls left out (K-32)."
    )
    inputs: list[JobInput] = Field(default_factory=list)
    packages: list[JobPackage] = Field(
        default_factory=list, description="Quicker ways to some of the inputs' files (I-09)."
    )
    environment_variables: dict[str, str] = Field(default_factory=dict)
    secret_names: list[str] = Field(
        default_factory=list, description="Variables whose values come with the grants."
    )
    execution_config: dict[str, Any] = Field(
        default_factory=dict, description="Content of execution.json (K-36)."
    )
    mounts: list[JobMount] = Field(default_factory=list)
    mounts_allowed: bool = False
    fail_fast: bool = Field(default=False, description="Join the command items with && (C-22).")
    respect_image_user: bool = Field(default=False, description="Do not force root (K-51).")
    time_limit_seconds: float | None = None
    no_output_timeout_seconds: float = 8 * 3600
    remote_debug: RemoteDebug | None = None
    notices: list[str] = Field(
        default_factory=list, description="Status lines to log before the start."
    )
    trace: dict[str, str] = Field(default_factory=dict, description="W3C trace context.")
    batches: bool = Field(
        default=False, description="The control plane understands `inputs-ready` reports."
    )


# ---------------------------------------------------------------------------------------------------------------
# Grants: control plane -> the agent that holds the lease, sealed to its ephemeral key
# ---------------------------------------------------------------------------------------------------------------


class Transfer(Message):
    """One signed request. `file://` URLs mean a directory shared between control plane and worker."""

    url: str
    method: Literal["GET", "PUT", "POST"] = "GET"
    headers: dict[str, str] = Field(default_factory=dict)
    expires_at: datetime | None = None


class RegistryLogin(Message):
    registry: str
    username: str
    password: str
    match: str | None = Field(
        default=None, description="Pattern of the entry that these credentials are from."
    )


class Parts(Message):
    """How a large file is written in parts; nothing is visible before `finish` is answered (O-17).

    `s3`: parts are PUT in any order, `finish` is a POST of their ETags. `azure`: blocks likewise, `finish` is a PUT of
    the list of their ids (`block_id`). `swift`: segments likewise, without `finish`: no temporary URL can
    write a manifest, so the control plane joins them when the agent asks for no further part (`parts`, count 0). `session`: one resumable session
    (Google Cloud Storage), whose chunks of `part_bytes` are PUT in order to the URL of part 1; the last one finishes.
    """

    style: Literal["s3", "azure", "swift", "session"]
    part_bytes: int = Field(description="Of every part but the last.")
    parts: dict[int, Transfer] = Field(
        default_factory=dict,
        description="By number, from 1. Not all at once: the agent asks for further and for fresh ones (`parts`).",
    )
    finish: Transfer | None = None


def block_id(number: int) -> str:
    """What Azure calls part `number` of an upload; all ids of a blob must be equally long."""
    return base64.b64encode(f"{number:06d}".encode()).decode()


class UploadGrant(Message):
    """Permission to write one fresh key (O-02). `upload_id` becomes the datum's id once its report is accepted.

    With `parts` the file goes there; `transfer` is what agents use that do not know parts.
    """

    upload_id: str
    transfer: Transfer
    parts: Parts | None = None


class Grants(Message):
    """Decrypted content of one entry of the grant stream."""

    v: int = PROTOCOL_VERSION
    archive: Transfer | None = None
    inputs: dict[str, Transfer] = Field(default_factory=dict, description="By JobFile.id.")
    secrets: dict[str, str] = Field(default_factory=dict)
    registry: RegistryLogin | None = None
    uploads: dict[str, UploadGrant] = Field(default_factory=dict, description="By GrantRequest.id.")
    refused: dict[str, str] = Field(
        default_factory=dict,
        description="Reason by JobFile.id or GrantRequest.id, or under `archive` or `registry`.",
    )
    initial: bool = Field(
        default=False, description="True on the grants that are pushed unasked after `leased`."
    )


class GrantRequest(Message):
    """`output`: name is the datum name. `log`: name is stdout, stderr or events. `input`: name is a JobFile.id.

    `parts`: name is the upload_id of a grant in parts; answered under `uploads` with `count` parts from `first` on and
    a fresh `finish`. Also asked for parts that were granted before, when their URLs have run out. With `count` 0, where
    there is no `finish`: all parts are stored, join them; the answer comes when the file is complete.
    """

    id: str
    kind: Literal["output", "log", "input", "parts"]
    name: str
    size: int | None = None
    first: int = 1
    count: int = 0


# ---------------------------------------------------------------------------------------------------------------
# Reports: agent -> control plane
# ---------------------------------------------------------------------------------------------------------------


class Phase(str, Enum):
    """Separate spans of an attempt; only `running` counts towards time limits."""

    preparing = "preparing"  # code archive, directories, config files
    pulling = "pulling"
    downloading = "downloading"
    running = "running"
    uploading = "uploading"


class Leased(Message):
    """First report of an attempt. The agent sends a host's facts once here, not with each report."""

    kind: Literal["leased"] = "leased"
    runtime: str = Field(description="docker or process")
    host: str = ""
    machine_id: str = ""
    agent_version: str = ""
    local_ips: list[str] = Field(default_factory=list)
    gpus: list[str] = Field(default_factory=list)


class GrantsWanted(Message):
    kind: Literal["grants-wanted"] = "grants-wanted"
    requests: list[GrantRequest]


class PhaseChanged(Message):
    """A phase began, or moved on (at most one progress report a second)."""

    kind: Literal["phase"] = "phase"
    phase: Phase
    message: str | None = Field(default=None, description="Words for people: `pulling 63 %`.")
    done: int | None = None
    total: int | None = None


class InputReady(Message):
    """One input file is in place (I-32: checksums are recorded with each use)."""

    kind: Literal["input-ready"] = "input-ready"
    input: str
    file_id: str
    name: str
    size: int
    checksums: Checksums
    cached: bool = False
    version: str | None = Field(
        default=None,
        description="What the source calls this content: ETag, generation, time and size.",
    )


class InputsReady(Message):
    """Many input files are in place; only for a control plane that understands it (`Job.batches`)."""

    kind: Literal["inputs-ready"] = "inputs-ready"
    files: list[InputReady]


class MetadataEvents(Message):
    """Metadata lines since the last report, at most one report a second. Each has `_time` (M-13)."""

    kind: Literal["metadata"] = "metadata"
    events: list[dict[str, Any]]


class OutputStored(Message):
    kind: Literal["output"] = "output"
    upload_id: str
    name: str = Field(description="Path below /valohai/outputs, / as separator.")
    size: int
    checksums: Checksums
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="From the sidecars (O-06, O-07)."
    )
    live: bool = False
    file_ctime: datetime | None = None
    file_mtime: datetime | None = None


class StatusDetail(Message):
    kind: Literal["status-detail"] = "status-detail"
    text: str


class Warned(Message):
    kind: Literal["warning"] = "warning"
    message: str


class StopAcknowledged(Message):
    """Proof that a stop reached the command: which signal was sent, and when."""

    kind: Literal["stop-acknowledged"] = "stop-acknowledged"
    signal: str
    message: str = ""


class PhaseSpan(Message):
    phase: str
    started_at: datetime
    ended_at: datetime


class Usage(Message):
    """Measured by the agent; None where the runtime cannot tell."""

    max_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    cpu_cores_average: float | None = None
    cpu_cores_peak: float | None = None
    gpu_memory_bytes_peak: int | None = Field(
        default=None, description="Of all the job's GPUs together."
    )
    gpu_utilization_peak: float | None = Field(
        default=None, description="Of the busiest GPU, 0 to 100."
    )
    oom_killed: bool = False


class LogStored(Message):
    """The complete log of one stream in the log store."""

    stream: Literal["stdout", "stderr", "events"]
    upload_id: str
    size: int
    lines: int = 0


class Outcome(str, Enum):
    complete = "complete"
    error = "error"
    stopped = "stopped"


class Finished(Message):
    """Last report of an attempt; outputs and logs are already stored."""

    kind: Literal["finished"] = "finished"
    outcome: Outcome
    exit_code: int | None = None
    reason: str | None = Field(
        default=None, description="Why it is not complete: names the thing and the next step."
    )
    phases: list[PhaseSpan] = Field(default_factory=list)
    usage: Usage = Usage()
    logs: list[LogStored] = Field(default_factory=list)
    interpolated_command: str | None = None
    preempted: bool = Field(
        default=False, description="Cut short because the machine, or its agent, has to leave."
    )


class LostLease(Message):
    """The agent gave up because another attempt holds the lease; for the audit trail only."""

    kind: Literal["lost-lease"] = "lost-lease"
    message: str = ""


class Preempted(Message):
    """The machine, or its agent, has to leave; `finished` follows if there is time for it."""

    kind: Literal["preempted"] = "preempted"
    seconds_left: float | None = Field(
        default=None, description="From the report's time; None if nobody knows."
    )
    what: str = Field(default="", description="For people: who reclaims the machine.")
    withdrawn: bool = Field(
        default=False,
        description="The machine stays after all: what was said before does not count.",
    )


ReportBody = Annotated[
    Union[
        Leased,
        GrantsWanted,
        PhaseChanged,
        InputReady,
        InputsReady,
        MetadataEvents,
        OutputStored,
        StatusDetail,
        Warned,
        StopAcknowledged,
        Finished,
        LostLease,
        Preempted,
    ],
    Field(discriminator="kind"),
]


class Report(Message):
    """One entry of `reports`, stored as JSON under the field `r`. Ordered by `seq` within an attempt, from 1."""

    v: int = PROTOCOL_VERSION
    execution_id: str
    attempt: int
    token: str
    seq: int
    worker: str
    time: datetime = Field(description="Agent's clock, UTC.")
    clock_offset_seconds: float = Field(
        0.0, description="Redis TIME minus the agent's clock when last measured."
    )
    body: ReportBody


# ---------------------------------------------------------------------------------------------------------------
# Commands: control plane -> agent
# ---------------------------------------------------------------------------------------------------------------


class Command(Message):
    """One entry of an agent's command stream, stored as JSON under the field `c`.

    stop: K-54 sequence for one execution; repeating it changes nothing. stop-hard: SIGKILL at once, sent for a user's
    second request (the control plane counts, since commands are delivered at least once).
    fence: the attempt lost its lease, kill it and report nothing. drain: finish what runs, take nothing new, exit.
    upload-now: pick up outputs now. update: exit when idle so that the supervisor starts a newer agent.
    """

    v: int = PROTOCOL_VERSION
    kind: Literal["stop", "stop-hard", "fence", "drain", "upload-now", "update"]
    execution_id: str | None = None
    token: str | None = None
    reason: str = ""


# ---------------------------------------------------------------------------------------------------------------
# Live log: agent -> anyone who looks
# ---------------------------------------------------------------------------------------------------------------


class LogStream(str, Enum):
    stdout = "stdout"
    stderr = "stderr"
    status = "status"


class LogLine(Message):
    """One entry of the live log, stored as the fields s, t, m, o, e (short, since there are many).

    `o` and `e` are the byte offsets of the line in the complete stored file of its stream, so a reader can go on
    in the stored file exactly where the live view ended. The status stream is stored in the `stderr` file, each
    line prefixed with `STATUS_PREFIX`. A gap marker (M-02) is an entry with `g` = number of lines left out.
    """

    s: LogStream
    t: str = Field(description="UTC ISO 8601 with microseconds, no offset (M-01).")
    m: str
    o: int = 0
    e: int = 0
    g: int = 0


STATUS_PREFIX = "[valohai] "


# ---------------------------------------------------------------------------------------------------------------
# The worker's own entry
# ---------------------------------------------------------------------------------------------------------------


class WorkerState(str, Enum):
    idle = "idle"
    busy = "busy"
    draining = "draining"


class Worker(Message):
    """Hash `worker:<name>`, one field per attribute, renewed with the heartbeat and gone when it expires."""

    name: str
    incarnation: str = Field(
        description="Random per process: tells two agents with one name apart."
    )
    group: str
    machine_id: str = ""
    host: str = ""
    pid: int = 0
    version: str = ""
    protocol: int = PROTOCOL_VERSION
    protocol_min: int = MIN_PROTOCOL_VERSION
    runtime: str = ""
    slots: int = 1
    busy: int = 0
    state: WorkerState = WorkerState.idle
    started_at: str = ""
    seen_at: str = ""
    disk_free_bytes: int = 0
    supervised: bool = Field(
        default=False, description="Told to `update`, it is started again as the published agent."
    )
    gpus: str = Field(default="", description="Comma-separated device names.")
    cached: str = Field(
        default="",
        description="Comma-separated marks (`content_mark`) of what the input cache holds: a few hundred of the largest.",
    )
