"""Permissions to read input files: those that came with the lease, and fresh ones when they are missing or have run out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta, timezone

from valohai_agent.errors import AgentError
from valohai_agent.protocol import MAX_GRANT_REQUESTS, Transfer

EXPIRY_MARGIN = timedelta(seconds=30)
Renew = Callable[[list[str]], Mapping[str, Transfer]]


class InputGrants:
    """Safe to use from several threads. `renew(file_ids)` asks the control plane (kind `input`).

    When one has run out, others have too: those of the files that are still to be fetched are asked for together.
    """

    def __init__(
        self,
        grants: Mapping[str, Transfer],
        renew: Renew | None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._grants, self._renew, self._now = dict(grants), renew, now
        self._wanted: dict[str, None] = {}
        self._in_vain: set[str] = set()
        self._failure: AgentError | None = None
        self._lock = threading.Lock()

    def expect(self, file_ids: Iterable[str]) -> None:
        """These are to be fetched, in about this order."""
        with self._lock:
            self._wanted.update(dict.fromkeys(file_ids))

    def settle(self, file_id: str) -> None:
        """This one is in its place or has failed."""
        with self._lock:
            self._wanted.pop(file_id, None)

    def get(self, file_id: str) -> Transfer | None:
        """One that is good for a while yet, if it can be had."""
        with self._lock:
            if self._is_stale(file_id) and self._renew is not None:
                self._require_hope()
                stale = [one for one in self._wanted if one != file_id and self._is_stale(one)]
                self._ask([file_id, *stale[: MAX_GRANT_REQUESTS - 1]])
            return self._grants.get(file_id)

    def known(self, file_id: str) -> Transfer | None:
        """The one that is there, however good."""
        with self._lock:
            return self._grants.get(file_id)

    def another(self, file_id: str, denied: Transfer) -> Transfer | None:
        """A fresh one in place of one that was denied; what was renewed meanwhile counts as such."""
        with self._lock:
            if self._grants.get(file_id) is denied:
                self._ask([file_id])
            return self._grants.get(file_id)

    # -- inside, with the lock held -------------------------------------------------------------------------------
    def _is_stale(self, file_id: str) -> bool:
        grant = self._grants.get(file_id)
        if grant is None:
            return file_id not in self._in_vain
        return grant.expires_at is not None and grant.expires_at - EXPIRY_MARGIN < self._now()

    def _require_hope(self) -> None:
        """When the control plane did not answer for one file, or nobody waits for it any more, it will not for others."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _ask(self, file_ids: list[str]) -> None:
        if self._renew is None:
            return
        self._require_hope()
        try:
            renewed = self._renew(file_ids)
        except AgentError as error:
            self._failure = error
            raise
        self._grants.update(renewed)
        self._in_vain.update(one for one in file_ids if one not in renewed)
