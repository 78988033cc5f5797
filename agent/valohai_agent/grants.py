"""Waits for grants: the control plane's sealed answers to one lease."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from valohai_agent.errors import AgentError
from valohai_agent.protocol import MAX_GRANT_REQUESTS, GrantRequest, Grants
from valohai_agent.redis_link import RedisLink
from valohai_agent.sealing import CannotOpen, PrivateKey, open_grants

logger = logging.getLogger(__name__)

READ_SECONDS = 2.0  # one blocking read; bounds how late an abort is noticed
ASK_AGAIN_SECONDS = (
    15.0  # doubled each time; an answer may be lost with Redis or with the control plane
)
ASK_AGAIN_LONGEST_SECONDS = 120.0


class NoGrants(AgentError):
    """The wait was cut short: the lease is lost, the execution is being stopped, or time ran out."""


class GrantBox:
    """Answers of the control plane by request. Safe for several threads: one reads, the others wait for it."""

    def __init__(
        self,
        link: RedisLink,
        *,
        stream: str,
        lease_key: str,
        token: str,
        private_key: PrivateKey,
        ask: Callable[[list[GrantRequest]], None],
        ask_first: Callable[[], None],
        aborted: Callable[[], bool],
    ) -> None:
        self._link, self._stream, self._lease_key, self._token = link, stream, lease_key, token
        self._private_key = private_key
        self._ask, self._ask_first, self._aborted = ask, ask_first, aborted
        self._changed = threading.Condition()
        self._reading = False
        self._initial: Grants | None = None
        self._answers = Grants()
        self._generation = 0

    def initial(self, *, timeout: float | None = None) -> Grants:
        """The grants that are pushed unasked after `leased`. Raises NoGrants."""
        self._wait(lambda: self._initial is not None, self._ask_first, timeout, "the first grants")
        return self._initial or Grants()

    def request(self, requests: list[GrantRequest], *, timeout: float | None = None) -> Grants:
        """Asks and waits until each request is granted or refused. Raises NoGrants."""
        answers = Grants()
        for first in range(0, len(requests), MAX_GRANT_REQUESTS):
            part = self._request(requests[first : first + MAX_GRANT_REQUESTS], timeout)
            answers = _merged(answers, part)
        return answers

    def ask_again(self) -> None:
        """Redis was emptied: answers on their way are lost, so whoever waits asks anew."""
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    def _request(self, requests: list[GrantRequest], timeout: float | None) -> Grants:
        with self._changed:
            for request in requests:
                if request.kind == "input":
                    self._answers.inputs.pop(request.name, None)
                    self._answers.refused.pop(request.name, None)
        names = ", ".join(request.name for request in requests[:3])
        what = f"grants for {names}{' and more' if len(requests) > 3 else ''}"
        self._require_patience(what)
        self._ask(requests)
        self._wait(
            lambda: not self._unanswered(requests),
            lambda: self._ask(self._unanswered(requests)),
            timeout,
            what,
        )
        with self._changed:
            return self._handed_over(requests)

    def _require_patience(self, what: str) -> None:
        if self._aborted():
            raise NoGrants(f"gave up waiting for {what}: the execution is ending")

    def _unanswered(self, requests: list[GrantRequest]) -> list[GrantRequest]:
        return [r for r in requests if not (set(_places(r)) & self._known(r))]

    def _known(self, request: GrantRequest) -> set[str]:
        granted = self._answers.inputs if request.kind == "input" else self._answers.uploads
        return granted.keys() | self._answers.refused.keys()

    def _handed_over(self, requests: list[GrantRequest]) -> Grants:
        """Takes the answers out, under the ids of their requests and, for inputs, under the file's id."""
        handed = Grants()
        for request in requests:
            for place in _places(request):
                for source, target in (
                    (self._answers.inputs, handed.inputs),
                    (self._answers.uploads, handed.uploads),
                    (self._answers.refused, handed.refused),
                ):
                    if place in source:
                        _move(place, source, target)
        return handed

    def _wait(
        self, done: Callable[[], bool], ask: Callable[[], None], timeout: float | None, what: str
    ) -> None:
        waited, since_asked, patience = 0.0, 0.0, ASK_AGAIN_SECONDS
        generation = self._generation
        while not done():
            self._require_patience(what)
            if timeout is not None and waited >= timeout:
                raise NoGrants(
                    f"the control plane did not answer within {timeout:g} s when asked for {what}; "
                    "see whether the conductor runs (valohai-dagster doctor)"
                )
            spent = self._read_or_wait(
                READ_SECONDS if timeout is None else min(READ_SECONDS, timeout)
            )
            waited += spent
            since_asked += spent
            if generation != self._generation or since_asked >= patience:
                generation, since_asked = self._generation, 0.0
                patience = min(patience * 2, ASK_AGAIN_LONGEST_SECONDS)
                if not done():
                    ask()

    def _read_or_wait(self, seconds: float) -> float:
        """One thread reads from Redis, the others wait for what it brings; gives the seconds spent."""
        started = time.monotonic()
        with self._changed:
            if self._reading:
                self._changed.wait(seconds)
                return time.monotonic() - started
            self._reading = True
        entries: list[bytes] = []
        try:
            entries = self._link.persist(lambda: self._read(seconds), give_up=self._aborted) or []
        finally:
            with self._changed:
                self._reading = False
                for entry in entries:
                    self._accept(entry)
                self._changed.notify_all()
        return time.monotonic() - started

    def _read(self, seconds: float) -> list[bytes]:
        found = self._link.client.xread(
            {self._stream: "0"}, count=1, block=max(1, int(seconds * 1000))
        )
        if not found:
            return []
        entries = self._link.fcall(
            "vh1_collect_grants", [self._stream, self._lease_key], self._token
        )
        if not entries:
            threading.Event().wait(
                0.2
            )  # the lease is not ours at this moment; its renewal finds out why
        return entries

    def _accept(self, sealed: bytes) -> None:
        try:
            grants = open_grants(sealed, self._private_key)
        except CannotOpen as exc:
            logger.warning("dropped a grant: %s", exc, extra={"action": "grant-dropped"})
            return
        if grants.initial:
            self._initial = grants
        self._answers = _merged(self._answers, grants)


def _places(request: GrantRequest) -> tuple[str, ...]:
    return (request.id, request.name) if request.kind == "input" else (request.id,)


def _move(key: str, source: dict[str, Any], target: dict[str, Any]) -> None:
    target[key] = source.pop(key)


def _merged(first: Grants, second: Grants) -> Grants:
    return Grants(
        inputs={**first.inputs, **second.inputs},
        uploads={**first.uploads, **second.uploads},
        refused={**first.refused, **second.refused},
    )
