"""Where worker machines ask: to join their group, to come back to it, and for their agent.

The only part of the service that answers with something secret, so it asks for a token first and seals the answer to
the machine that asked. Tokens have 256 bits and are used up; the limit on failures only bounds the work that strangers
can cause, and holds for tokens that are not known.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import redis
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from valohai_agent.machine.messages import (
    FILE_PATH,
    JOIN_PATH,
    MAX_REQUEST_BYTES,
    REFRESH_PATH,
    JoinRequest,
    SealedAnswer,
    seal,
)
from valohai_agent.protocol import Keys, utcnow
from valohai_dagster.capacity.bootstrap.joining import (
    Admission,
    NotAdmitted,
    NotListed,
    agents_passwords,
    answer,
    is_known,
    make_user,
    redeem,
    show_ticket,
    ticket_of,
)
from valohai_dagster.capacity.bootstrap.releases import current_release, offer, releases
from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.errors import ConfigurationError, ServiceUnavailable, StoreError
from valohai_dagster.records.engine import Records
from valohai_dagster.settings import Settings
from valohai_dagster.stores.registry import Stores
from valohai_dagster.web.file_answers import file_answer

log = logging.getLogger(__name__)

FAILURES, WINDOW_SECONDS = 30, 60.0  # of one address
MOST_ADDRESSES = 10_000


class Joining:
    """Routes for machines. Everything it needs from outside is read anew at each request."""

    def __init__(
        self,
        settings: Settings,
        *,
        records: Records,
        stores: Stores,
        secret_key: SecretKey,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._settings, self._records, self._stores = settings, records, stores
        self._key, self._clock = secret_key, clock
        self._keys = Keys(records.deployment_id)
        self._failures = Failures()

    def routes(self) -> Sequence[BaseRoute]:
        return [
            Route(JOIN_PATH, self.join, methods=["POST"]),
            Route(REFRESH_PATH, self.refresh, methods=["POST"]),
            Route(FILE_PATH + "/{sha256}/{name}", self.file),
        ]

    async def join(self, request: Request) -> Response:
        return await self._answered(request, self._join)

    async def refresh(self, request: Request) -> Response:
        return await self._answered(request, self._refresh)

    def file(self, request: Request) -> Response:
        """A published agent. It is no secret, and its receiver knows the digest."""
        wanted = request.path_params["sha256"]
        with self._records.read() as conn:
            found = next((one for one in releases(conn) if one.sha256 == wanted), None)
        if found is None:
            return PlainTextResponse("no such agent is published\n", 404)
        try:
            store = self._stores[found.store]
        except StoreError as error:
            return PlainTextResponse(f"{error}\n", 503)
        headers = {"ETag": f'"{found.sha256}"', "Cache-Control": "public, immutable"}
        name = request.path_params["name"]
        return file_answer(request, store, found.key, name=name, size=found.size, headers=headers)

    # -- inside ------------------------------------------------------------------------------------------------------
    async def _answered(
        self, request: Request, admit: Callable[[JoinRequest], SealedAnswer]
    ) -> Response:
        address = request.client.host if request.client else ""
        try:
            wanted = JoinRequest.model_validate_json(await _body(request))
        except TooLarge:
            return _refusal(413, "this is no request of a machine")
        except ValidationError:
            return _refusal(422, "this is no request of a machine; is its agent of this release?")
        try:
            # Behind a proxy all machines have one address, and so may somebody who guesses.
            wait = self._failures.wait(address)
            if wait and not await run_in_threadpool(self._knows, wanted):
                headers = {"Retry-After": str(int(wait) + 1)}
                return _refusal(429, "too many refused tokens from this address; wait", headers)
            sealed = await run_in_threadpool(admit, wanted)
        except NotAdmitted as error:
            self._failures.note(address)
            log.warning(
                "machine %s at %s was not admitted",
                wanted.machine_id,
                address,
                extra={"action": "join-refused"},
            )
            return _refusal(403, str(error))
        except NotListed as error:
            log.info(
                "machine %s waits: %s", wanted.machine_id, error, extra={"action": "join-waits"}
            )
            return _refusal(503, str(error))
        except GroupGone as error:
            return _refusal(410, str(error))
        except (ConfigurationError, ServiceUnavailable, StoreError) as error:
            log.error("machine %s cannot join: %s", wanted.machine_id, error, extra=_CANNOT)
            return _refusal(503, str(error))
        except (redis.RedisError, DBAPIError) as error:
            log.error("machine %s cannot join: %s", wanted.machine_id, error, extra=_CANNOT)
            return _refusal(503, "the control plane's database or Redis is away; try again")
        return JSONResponse(sealed.model_dump(), headers={"Cache-Control": "no-store"})

    def _knows(self, wanted: JoinRequest) -> bool:
        with self._records.read() as conn:
            return is_known(conn, wanted.token, now=self._clock())

    def _join(self, wanted: JoinRequest) -> SealedAnswer:
        now = self._clock()
        with self._records.write() as conn:
            admission = redeem(conn, wanted, now=now)
            ticket = ticket_of(conn, self._key, admission, wanted.public_key, now=now)
        log.info(
            "machine %s (%s) joins group %s",
            wanted.machine_id,
            wanted.hostname,
            admission.group,
            extra={"action": "join", "group": admission.group, "machine": wanted.machine_id},
        )
        return self._sealed(wanted, admission, ticket)

    def _refresh(self, wanted: JoinRequest) -> SealedAnswer:
        with self._records.write() as conn:
            admission = show_ticket(conn, wanted, now=self._clock())
        return self._sealed(wanted, admission, wanted.token)

    def _sealed(self, wanted: JoinRequest, admission: Admission, ticket: str) -> SealedAnswer:
        group, settings = admission.group, self._settings
        if group not in settings.groups:
            raise GroupGone(group)
        with self._records.read() as conn:
            passwords = agents_passwords(conn, self._key, self._keys.deployment, group)
            release = current_release(conn)
        make_user(settings, self._keys, group, passwords)
        given = answer(
            settings,
            deployment=self._keys.deployment,
            admission=admission,
            ticket=ticket,
            password=passwords.current,
            release=release and offer(release, settings, self._stores),
        )
        return seal(given, wanted.public_key)


_CANNOT = {"action": "join-failed"}


class GroupGone(Exception):
    """The group of a token is not in the settings any more."""

    def __init__(self, group: str) -> None:
        super().__init__(f"there is no worker group {group!r} any more")


class TooLarge(Exception):
    """The request is longer than any of ours."""


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REQUEST_BYTES:
            raise TooLarge
    return body


def _refusal(code: int, why: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": why}, code, headers)


@dataclass
class Failures:
    """Refusals by address within the last minute."""

    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._seen: dict[str, deque[float]] = defaultdict(deque)

    def wait(self, address: str) -> float:
        """Seconds until this address may ask again."""
        times = self._seen.get(address)
        if not times:
            return 0.0
        now = self.clock()
        while times and now - times[0] >= WINDOW_SECONDS:
            times.popleft()
        return WINDOW_SECONDS - (now - times[0]) if len(times) >= FAILURES else 0.0

    def note(self, address: str) -> None:
        if len(self._seen) >= MOST_ADDRESSES:
            self._seen.clear()
        self._seen[address].append(self.clock())
