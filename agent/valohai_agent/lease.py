"""The right to run one attempt: renewed while the agent lives, and told apart from others by its token."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from valohai_agent.clock import Clock
from valohai_agent.grants import GrantBox
from valohai_agent.live_log import LiveLog
from valohai_agent.protocol import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    GrantRequest,
    Grants,
    GrantsWanted,
    Job,
    Keys,
    Leased,
    ReportBody,
    Transfer,
)
from valohai_agent.redis_link import RedisLink
from valohai_agent.reporter import Reporter
from valohai_agent.sealing import PrivateKey, new_private_key, public_key_of

logger = logging.getLogger(__name__)


class Credentials:
    """Token and key pair that an agent brings along when it takes a job; new ones for each lease."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self.private_key: PrivateKey = new_private_key()
        self.public_key = public_key_of(self.private_key)


class Lease:
    """One attempt that this agent holds: its reports, grants and live log.

    A thread renews it every RENEW_SECONDS. While Redis is away the attempt goes on; what matters is the answer once it
    is back: `held`, `restored` (Redis had lost it: everything is told again) or `lost` (another attempt runs: `lost`
    is set, `on_lost` is called, and nothing is reported any more).
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        *,
        job: Job,
        attempt: int,
        credentials: Credentials,
        worker: Callable[[], str],
        incarnation: str,
        clock: Clock,
        spool_dir: Path | None = None,
        renew_seconds: float = RENEW_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.job, self.attempt, self.token = job, attempt, credentials.token
        self.execution_id = job.execution_id
        self.phase = "leased"
        self.lost = threading.Event()
        self.on_lost: Callable[[], None] = lambda: None
        self._link, self._credentials = link, credentials
        self._worker, self._incarnation = worker, incarnation
        self._renew_seconds, self._lease_seconds = renew_seconds, lease_seconds
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._aborted: Callable[[], bool] = lambda: False
        self._leased: Leased | None = None
        group = job.group
        self._lease_key = keys.lease(group, job.execution_id)
        self._job_key = keys.job(group, job.execution_id)
        self.reporter = Reporter(
            link,
            stream=keys.reports(group, job.shard),
            lease_key=self._lease_key,
            reclaim=self._renew_persistently,
            execution_id=job.execution_id,
            attempt=attempt,
            token=self.token,
            worker=worker,
            clock=clock,
            spool_dir=spool_dir,
        )
        self.live_log = LiveLog(link, keys.log(group, job.execution_id, attempt))
        self._grants = GrantBox(
            link,
            stream=keys.grant(group, job.execution_id),
            lease_key=self._lease_key,
            token=self.token,
            private_key=credentials.private_key,
            ask=lambda requests: self.report(GrantsWanted(requests=requests)),
            ask_first=self._report_leased,
            aborted=lambda: self.lost.is_set() or self._closed.is_set() or self._aborted(),
        )
        self._thread = threading.Thread(
            target=self._keep, name=f"lease-{self.execution_id[:8]}", daemon=True
        )

    def start(self, leased: Leased, *, aborted: Callable[[], bool] = lambda: False) -> None:
        """Says that the attempt is ours and begins to renew. `aborted` ends waits for grants (NoGrants)."""
        self._leased, self._aborted = leased, aborted
        self._report_leased()
        self._link.on_return(self._wake)
        self._thread.start()

    def report(self, body: ReportBody) -> None:
        self.reporter.send(body)

    def grants(self, timeout: float | None = None) -> Grants:
        """The first grants: code archive, inputs, secrets, registry login. Raises NoGrants."""
        return self._grants.initial(timeout=timeout)

    def request_grants(self, requests: list[GrantRequest], timeout: float | None = None) -> Grants:
        """Permission for outputs, logs and renewed inputs; blocks until all are answered. Raises NoGrants."""
        return self._grants.request(requests, timeout=timeout)

    def input_grants(self, file_ids: list[str]) -> Grants:
        """Fresh grants for input files, found under the files' own ids."""
        requests = [
            GrantRequest(id=f"input-{secrets.token_hex(6)}", kind="input", name=file_id)
            for file_id in file_ids
        ]
        answers = self.request_grants(requests)
        names = {request.id: request.name for request in requests}
        refused = {names.get(key, key): reason for key, reason in answers.refused.items()}
        return Grants(inputs=_by_name(answers.inputs, names), refused=refused)

    def close(self) -> None:
        """Stops renewing; the control plane removes the lease when it applies `finished`, else it expires."""
        self._closed.set()
        self._wake.set()
        self._link.off_return(self._wake)
        self.live_log.close(0)
        self.reporter.close()

    def fence(self) -> None:
        """Another attempt holds the lease, or the control plane says so: nothing of this one counts."""
        if self.lost.is_set():
            return
        self.lost.set()
        self.reporter.drop()
        extra = {"action": "lease-lost", "execution": self.execution_id, "attempt": self.attempt}
        logger.warning(
            "lost the lease of %s attempt %d", self.execution_id, self.attempt, extra=extra
        )
        self.on_lost()

    def _report_leased(self) -> None:
        """Told again it asks for the first grants again."""
        if self._leased is not None:
            self.report(self._leased)

    def _keep(self) -> None:
        while not (self._closed.is_set() or self.lost.is_set()):
            self._wake.wait(self._renew_seconds)
            self._wake.clear()
            if self._closed.is_set():
                return
            self._renew_persistently()

    def _renew_persistently(self) -> None:
        self._link.persist(self._renew, give_up=self._over, wake=self._closed)

    def _over(self) -> bool:
        return self._closed.is_set() or self.lost.is_set()

    def _renew(self) -> bool:
        """One renewal, and what follows from it, before any other report can be sent."""
        with self.reporter.sending:
            if self.reporter.told_the_end:
                return True
            answer = self._link.fcall(
                "vh1_renew",
                [self._lease_key, self._job_key],
                self._worker(),
                self._incarnation,
                self.token,
                self.attempt,
                self._credentials.public_key,
                int(self._lease_seconds * 1000),
                self.phase,
            )
            if answer == b"lost":
                self.fence()
            elif answer == b"restored":
                self._tell_again()
        return True

    def _tell_again(self) -> None:
        extra = {
            "action": "lease-restored",
            "execution": self.execution_id,
            "attempt": self.attempt,
        }
        logger.warning(
            "Redis had lost the lease of %s; wrote it again and repeat the reports",
            self.execution_id,
            extra=extra,
        )
        self.reporter.replay()
        self._grants.ask_again()


def _by_name(granted: Mapping[str, Transfer], names: Mapping[str, str]) -> dict[str, Transfer]:
    return {names.get(key, key): transfer for key, transfer in granted.items()}
