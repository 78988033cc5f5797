"""One agent process as the control plane sees it: its name, its heartbeat, and the jobs it takes."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis
from pydantic import ValidationError
from redis.exceptions import NoPermissionError

from valohai_agent.clock import Clock, SystemClock
from valohai_agent.errors import AgentError
from valohai_agent.host import Host, disk_free_bytes
from valohai_agent.lease import Credentials, Lease
from valohai_agent.protocol import (
    LEASE_SECONDS,
    MIN_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    RENEW_SECONDS,
    Finished,
    Job,
    Keys,
    Outcome,
    Worker,
    WorkerState,
)
from valohai_agent.redis_link import BLOCK_SECONDS, RedisLink, RedisRefused
from valohai_agent.reporter import Reporter
from valohai_agent.version import __version__

logger = logging.getLogger(__name__)

CLOCK_SECONDS = 60.0  # how often the offset to Redis TIME is measured


class NameTaken(AgentError):
    """Another living agent of this group has the name."""


class UnreadableJob(AgentError):
    """The queue handed over a job that this agent cannot read; the execution has been told so."""


@dataclass(frozen=True, kw_only=True)
class AgentIdentity:
    """What an agent says about itself and never changes."""

    deployment: str
    group: str
    name: str
    slots: int = 1
    runtime: str = ""
    host: Host = field(default_factory=Host)
    supervised: bool = False
    protocol_min: int = MIN_PROTOCOL_VERSION
    protocol_max: int = PROTOCOL_VERSION


class Session:
    """Registers a name, keeps it alive with a heartbeat, and takes jobs.

    `cached` gives the content keys of the input cache. `renew_seconds` and `lease_seconds` are the protocol's; tests
    make them short.
    """

    def __init__(
        self,
        link: RedisLink,
        identity: AgentIdentity,
        *,
        work_dir: Path,
        clock: Clock | None = None,
        cached: Callable[[], list[str]] = list,
        renew_seconds: float = RENEW_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.link, self.identity = link, identity
        self.keys = Keys(identity.deployment)
        self.name = identity.name
        self.incarnation = secrets.token_hex(8)
        self.busy = 0
        self.draining = False
        self.on_rename: Callable[[str], None] = lambda key: None
        self._clock = clock or SystemClock()
        self._work_dir = work_dir
        self._cached = cached
        self._renew_seconds, self._lease_seconds = renew_seconds, lease_seconds
        self._started_at = self._clock.now().isoformat()
        self._clock_measured_at = time.monotonic()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    # -- the name -------------------------------------------------------------------------------------------------
    def register(self, *, stop: threading.Event | None = None) -> None:
        """Takes the name. An entry left by a process that died is waited out; a living holder raises NameTaken.

        Raises RedisRefused when the user of the URL has no rights on this group.
        """
        cancelled = stop or threading.Event()
        last_seen: bytes | None = None
        deadline = time.monotonic() + self._lease_seconds + 10
        while not cancelled.is_set():
            if self.link.persist(self._first_beat, give_up=cancelled.is_set, wake=cancelled):
                self._thread.start()
                return
            holder = self._holder()
            alive = last_seen is not None and holder[0] not in (None, last_seen)
            if alive or (time.monotonic() > deadline and not self.link.away):
                raise NameTaken(self._taken_message(holder))
            last_seen = holder[0] or last_seen
            cancelled.wait(min(1.0, self._lease_seconds / 10))

    def beat(self) -> bool:
        """One heartbeat; False when another process holds the name."""
        fields = [part for pair in self._fields().items() for part in pair]
        key = self.keys.worker(self.identity.group, self.name)
        ttl_ms = int(self._lease_seconds * 1000)
        return bool(self.link.fcall("vh1_heartbeat", [key], self.incarnation, ttl_ms, *fields))

    def _first_beat(self) -> bool:
        """Missing rights are waited out later (an operator can repair them), not at the start: it may be a mistake."""
        try:
            return self.beat()
        except NoPermissionError as exc:
            raise RedisRefused(
                f"Redis at {self.link.url} does not let this user work for the group {self.identity.group!r} of "
                f"deployment {self.identity.deployment}: {exc}. Check --queue and --deployment, and that the user "
                "was made for this group (`valohai-dagster agents acl`)."
            ) from exc

    def changed(self) -> None:
        """State or occupation changed: the heartbeat comes at once."""
        self._wake.set()

    def close(self) -> None:
        """Stops the heartbeat and lets go of the name, if Redis is there."""
        self._closed.set()
        self._wake.set()
        self._lease_seconds = 0.001
        try:
            self.beat()
        except (redis.RedisError, OSError) as exc:
            logger.info("could not sign off: %s", exc, extra={"action": "sign-off-failed"})

    # -- jobs -----------------------------------------------------------------------------------------------------
    def wait_for_bell(
        self, seconds: float = BLOCK_SECONDS, *, stop: threading.Event | None = None
    ) -> None:
        """Sleeps until the control plane rings, at most `seconds`; the ready set decides, not the bell."""
        bell = self.keys.bell(self.identity.group)
        cancelled = stop or self._closed
        self.link.persist(
            lambda: self.link.client.blpop([bell], timeout=seconds) or True,
            give_up=cancelled.is_set,
            wake=cancelled,
        )

    def take(self) -> Lease | None:
        """The best job that this agent understands, leased to it; None when there is none.

        Raises redis errors: after a broken connection nobody knows whether a job was taken, so repeating is left to
        the caller; a lease that was written unseen expires and its job is queued again.
        """
        group, credentials = self.identity.group, Credentials()
        with self.link.noting():
            answer = self.link.fcall(
                "vh1_take",
                [self.keys.ready(group), self.keys.worker(group, self.name)],
                self.keys.group_prefix(group),
                self.name,
                self.incarnation,
                credentials.token,
                credentials.public_key,
                int(self._lease_seconds * 1000),
                self.identity.protocol_min,
                self.identity.protocol_max,
            )
        return self._lease(answer, credentials) if answer else None

    def _lease(self, answer: list[bytes], credentials: Credentials) -> Lease:
        execution_id, text, attempt = answer[0].decode(), answer[1], int(answer[2])
        try:
            job = Job.model_validate_json(text)
        except ValidationError as exc:
            reason = (
                f"agent {__version__} cannot read job {execution_id}, attempt {attempt}, although it speaks its protocol "
                f"version: {exc}. Install the agent of the control plane's own release."
            )
            self._refuse(execution_id, attempt, credentials.token, reason)
            raise UnreadableJob(reason) from exc
        return Lease(
            self.link,
            self.keys,
            job=job,
            attempt=attempt,
            credentials=credentials,
            worker=lambda: self.name,
            incarnation=self.incarnation,
            clock=self._clock,
            spool_dir=self._work_dir,
            renew_seconds=self._renew_seconds,
            lease_seconds=self._lease_seconds,
        )

    def _refuse(self, execution_id: str, attempt: int, token: str, reason: str) -> None:
        """Ends an attempt that cannot even begin; running into the same wall three times would tell less."""
        reporter = Reporter(
            self.link,
            stream=self.keys.reports(self.identity.group),
            lease_key=self.keys.lease(self.identity.group, execution_id),
            reclaim=lambda: reporter.drop(),
            execution_id=execution_id,
            attempt=attempt,
            token=token,
            worker=lambda: self.name,
            clock=self._clock,
        )
        reporter.send(Finished(outcome=Outcome.error, reason=reason))
        reporter.flush(self._lease_seconds)
        reporter.close()

    # -- inside ---------------------------------------------------------------------------------------------------
    @property
    def state(self) -> WorkerState:
        if self.draining:
            return WorkerState.draining
        return WorkerState.busy if self.busy else WorkerState.idle

    def _fields(self) -> dict[str, str]:
        identity = self.identity
        worker = Worker(
            name=self.name,
            incarnation=self.incarnation,
            group=identity.group,
            machine_id=identity.host.machine_id,
            host=identity.host.hostname,
            pid=os.getpid(),
            version=__version__,
            protocol=identity.protocol_max,
            protocol_min=identity.protocol_min,
            runtime=identity.runtime,
            supervised=identity.supervised,
            slots=identity.slots,
            busy=self.busy,
            state=self.state,
            started_at=self._started_at,
            seen_at=self._clock.now().isoformat(),
            disk_free_bytes=disk_free_bytes(self._work_dir),
            gpus=",".join(identity.host.gpus),
            cached=",".join(self._cached()),
        )
        fields = worker.model_dump(mode="json", exclude={"incarnation"})
        return {name: str(value) for name, value in fields.items()}

    def _keep(self) -> None:
        self.link.on_return(self._wake)
        while not self._closed.is_set():
            self._wake.wait(self._renew_seconds)
            self._wake.clear()
            if self._closed.is_set():
                return
            if (
                self.link.persist(
                    self._beat_and_measure, give_up=self._closed.is_set, wake=self._closed
                )
                is False
            ):
                self._rename()

    def _beat_and_measure(self) -> bool:
        if time.monotonic() - self._clock_measured_at > CLOCK_SECONDS:
            self.link.measure_clock()
            self._clock_measured_at = time.monotonic()
        return self.beat()

    def _rename(self) -> None:
        """Another agent took the name while Redis had forgotten us. Our running leases must not suffer for that."""
        before, self.name = self.name, f"{self.identity.name}-{secrets.token_hex(3)}"
        logger.error(
            "another agent registered as %r while this one was out of touch; going on as %r. Give each agent of a "
            "group its own --name.",
            before,
            self.name,
            extra={"action": "renamed"},
        )
        self.on_rename(self.keys.command(self.identity.group, self.name))
        self._wake.set()

    def _holder(self) -> tuple[bytes | None, str, str]:
        """When the name's holder was last seen, its host and pid; unknown if we may not look."""
        key = self.keys.worker(self.identity.group, self.name)
        try:
            seen, host, pid = self.link.client.hmget(key, "seen_ms", "host", "pid")
        except (redis.RedisError, OSError):
            return None, "", ""
        return seen, (host or b"").decode(), (pid or b"").decode()

    def _taken_message(self, holder: tuple[bytes | None, str, str]) -> str:
        _, host, pid = holder
        return (
            f"the name {self.name!r} is in use in group {self.identity.group!r} by a living agent "
            f"(host {host or 'unknown'}, pid {pid or 'unknown'}). Stop that one, or give this one another --name."
        )
