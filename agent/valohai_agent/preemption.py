"""Notices of clouds that this machine is about to go away (L-30): who is asked, and what the answer means.

| Cloud | Asked | Time that is left |
|---|---|---|
| AWS | `spot/instance-action` by IMDSv2 | 2 minutes |
| Google Cloud | `instance/preempted`; `instance/maintenance-event` | 30 s; 60 s, an hour with GPUs |
| Azure | scheduled events of this machine; acknowledged once nothing runs here | at least 30 s |

Reading an answer is pure; `PreemptionWatch` is the thread that asks.
"""

from __future__ import annotations

import fcntl
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

from valohai_agent.clock import Clock, SystemClock
from valohai_agent.metadata_service import BASE_URL, Cloud, MetadataService, Unanswered
from valohai_agent.protocol import Preempted

logger = logging.getLogger(__name__)

INTERRUPT_SECONDS = 180.0  # K-53: with more time left than this, what runs goes on for a while
GOOGLE_SECONDS = timedelta(seconds=30)
GOOGLE_MAINTENANCE = timedelta(seconds=60)
GOOGLE_MAINTENANCE_GPUS = timedelta(hours=1)
AZURE_VERSION = "2020-07-01"
AWS_TOKEN_SECONDS = 21600

_AWS_ENDS = {"terminate", "stop", "hibernate"}
_AZURE_ENDS = {"Preempt", "Terminate", "Reboot", "Redeploy"}  # a `Freeze` lasts seconds


@dataclass(frozen=True, kw_only=True)
class Notice:
    """This machine goes away. `gone_at` None: nobody knows when, so it may be at once."""

    what: str
    gone_at: datetime | None = None
    event: str | None = None  # to acknowledge

    def seconds_left(self, now: datetime) -> float | None:
        return max(0.0, (self.gone_at - now).total_seconds()) if self.gone_at else None

    def seconds_to_interrupt(self, now: datetime) -> float:
        """How long commands may go on before they have to be interrupted."""
        left = self.seconds_left(now)
        return max(0.0, left - INTERRUPT_SECONDS) if left is not None else 0.0

    def replaces(self, other: Notice) -> bool:
        """Whether it says more than `other`, which was said before: an earlier time, or of another event."""
        if self.event != other.event or other.gone_at is None:
            return self.event != other.event
        return self.gone_at is None or self.gone_at < other.gone_at


def report_of(notice: Notice | None, now: datetime) -> Preempted:
    """What the control plane is told; None: the notice before was taken back."""
    if notice is None:
        return Preempted(withdrawn=True)
    return Preempted(seconds_left=notice.seconds_left(now), what=notice.what)


class Notices(Protocol):
    """One cloud. Both raise `Unanswered`."""

    every_seconds: float

    def look(self, now: datetime) -> Notice | None: ...

    def acknowledge(self, notice: Notice) -> None:
        """Nothing runs here any more: the cloud need not wait."""
        ...


# -- Amazon --------------------------------------------------------------------------------------------------------


def aws_notice(answer: str | None) -> Notice | None:
    """Of `spot/instance-action`; there is none (404) while nothing is planned."""
    told = _mapping(answer)
    action = told.get("action")
    if action not in _AWS_ENDS:
        return None
    return Notice(
        what=f"AWS reclaims this spot machine ({action})", gone_at=_time(told.get("time"))
    )


class AwsNotices:
    """IMDSv2; its token is renewed when it is not accepted any more."""

    every_seconds = 5.0  # as AWS recommends

    def __init__(self, service: MetadataService) -> None:
        self._service = service
        self._token: str | None = None

    def look(self, now: datetime) -> Notice | None:
        known = self._token is not None
        try:
            return aws_notice(self._ask())
        except Unanswered:
            self._token = None
            if not known:
                raise
        return aws_notice(self._ask())

    def _ask(self) -> str | None:
        if self._token is None:
            life = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_SECONDS)}
            self._token = self._service.ask("PUT", "/latest/api/token", life)
        header = {"X-aws-ec2-metadata-token": self._token or ""}
        return self._service.get("/latest/meta-data/spot/instance-action", header)

    def acknowledge(self, notice: Notice) -> None:
        """AWS waits for nobody."""


# -- Google --------------------------------------------------------------------------------------------------------


def google_notice(
    preempted: str | None, maintenance: str | None, now: datetime, *, gpus: bool
) -> Notice | None:
    """No time is told: it counts from when the notice is first seen."""
    if preempted == "TRUE":
        what = "Google Cloud reclaims this spot machine"
        return Notice(what=what, gone_at=now + GOOGLE_SECONDS)
    if maintenance == "TERMINATE_ON_HOST_MAINTENANCE":
        what = "Google Cloud stops this machine for maintenance of its host"
        left = GOOGLE_MAINTENANCE_GPUS if gpus else GOOGLE_MAINTENANCE
        return Notice(what=what, gone_at=now + left)
    return None


class GoogleNotices:
    every_seconds = 1.0  # of 30

    def __init__(self, service: MetadataService, *, gpus: bool) -> None:
        self._service, self._gpus = service, gpus

    def look(self, now: datetime) -> Notice | None:
        preempted, maintenance = self._ask("preempted"), self._ask("maintenance-event")
        return google_notice(preempted, maintenance, now, gpus=self._gpus)

    def _ask(self, name: str) -> str | None:
        header = {"Metadata-Flavor": "Google"}
        return self._service.get(f"/computeMetadata/v1/instance/{name}", header)

    def acknowledge(self, notice: Notice) -> None:
        """Google waits for nobody."""


# -- Microsoft -----------------------------------------------------------------------------------------------------


def azure_notice(answer: str | None, machine: str) -> Notice | None:
    """The first event that ends this machine. Machines of a scale set see the events of each other."""
    ends = [
        event
        for event in _mapping(answer).get("Events") or ()
        if event.get("EventType") in _AZURE_ENDS and machine in (event.get("Resources") or ())
    ]
    if not ends:
        return None
    event = min(ends, key=lambda one: _http_time(one.get("NotBefore")) or _PAST)
    return Notice(
        what=f"Azure ends this machine ({event['EventType']})",
        gone_at=_http_time(event.get("NotBefore")),  # empty once it has begun
        event=event.get("EventId"),
    )


class AzureNotices:
    every_seconds = 2.0
    _PATH = f"/metadata/scheduledevents?api-version={AZURE_VERSION}"
    _NAME = f"/metadata/instance/compute/name?api-version={AZURE_VERSION}&format=text"
    _HEADER: ClassVar = {"Metadata": "true"}

    def __init__(self, service: MetadataService) -> None:
        self._service = service
        self._machine: str | None = None

    def look(self, now: datetime) -> Notice | None:
        if not self._machine:
            self._machine = self._service.get(self._NAME, self._HEADER)
        return azure_notice(self._service.get(self._PATH, self._HEADER), self._machine or "")

    def acknowledge(self, notice: Notice) -> None:
        if notice.event is not None:
            body = json.dumps({"StartRequests": [{"EventId": notice.event}]}).encode()
            header = {**self._HEADER, "Content-Type": "application/json"}
            self._service.ask("POST", self._PATH, header, body)


# -- the thread that asks ------------------------------------------------------------------------------------------


def notices_of(cloud: Cloud, base_url: str | None = None, *, gpus: bool = False) -> Notices:
    """`gpus`: whether the machine has any; it then hears of maintenance earlier."""
    service = MetadataService(base_url or BASE_URL)
    if cloud is Cloud.gcp:
        return GoogleNotices(service, gpus=gpus)
    return AwsNotices(service) if cloud is Cloud.aws else AzureNotices(service)


class PreemptionWatch:
    """Asks until it is closed; `on_notice` is called with each notice that says more than the one before (an hour
    ahead, then 30 s), and with None when a notice was taken back.

    `directory` is what all agents of the machine share: the notice is acknowledged by the last one that leaves, since
    the machine may go at once then.
    """

    def __init__(
        self,
        notices: Notices,
        *,
        on_notice: Callable[[Notice | None], None],
        directory: Path,
        clock: Clock | None = None,
    ) -> None:
        self._notices, self._on_notice = notices, on_notice
        self._clock = clock or SystemClock()
        self._notice: Notice | None = None
        self._silent = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preemption", daemon=True)
        self._lock = open(directory / "agents.lock", "wb")  # noqa: SIM115 - held as long as the agent lives
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def start(self) -> None:
        """The first look is over when this returns: nothing is taken on a machine that is being reclaimed."""
        self.look()
        self._thread.start()

    def look(self) -> None:
        try:
            notice = self._notices.look(self._clock.now())
        except Unanswered as error:
            self._say_silent(error)
            return
        self._silent = False
        known = self._notice
        if notice is None:
            if known is not None:
                extra = {"action": "preemption-withdrawn"}
                logger.warning("%s: this was taken back", known.what, extra=extra)
                self._tell(None)
        elif known is None or notice.replaces(known):
            left = notice.seconds_left(self._clock.now())
            words = "at an unknown time" if left is None else f"in {left:.0f} s"
            logger.warning("%s %s", notice.what, words, extra={"action": "preempted"})
            self._tell(notice)

    def _tell(self, notice: Notice | None) -> None:
        self._notice = notice
        self._on_notice(notice)

    def close(self) -> None:
        """Nothing runs here any more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            if self._notice is not None and self._is_last():
                try:
                    self._notices.acknowledge(self._notice)
                except Unanswered as error:
                    self._say_silent(error)

    def _run(self) -> None:
        while not self._closed.wait(self._notices.every_seconds):
            self.look()

    def _is_last(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _say_silent(self, error: Unanswered) -> None:
        """Once for each silence."""
        if not self._silent:
            self._silent = True
            text = "the metadata service does not answer, a reclaim of this machine would come unannounced: %s"
            logger.warning(text, error, extra={"action": "metadata-silent"})


# -- values --------------------------------------------------------------------------------------------------------

_PAST = datetime.min.replace(tzinfo=timezone.utc)


def _mapping(text: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _time(text: Any) -> datetime | None:
    """`2026-01-01T08:22:00Z`."""
    try:
        time = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def _http_time(text: Any) -> datetime | None:
    """`Mon, 19 Sep 2016 18:29:47 GMT`."""
    try:
        return parsedate_to_datetime(str(text))
    except (TypeError, ValueError):
        return None
