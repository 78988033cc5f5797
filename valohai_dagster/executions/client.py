"""The client of the execution service: submit, follow, stop.

Used by op processes, the run driver and the CLI. It neither mints nor reaps anything: killing a client loses
nothing, and submitting the same execution again re-attaches to it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import redis

from valohai_agent.protocol import Keys
from valohai_dagster.broker.connection import connect
from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.embedded.conductor import apply_settings, ensure_conductor
from valohai_dagster.errors import BrokerUnavailable, ServiceUnavailable
from valohai_dagster.executions.credentials import seal_credentials
from valohai_dagster.executions.ledger import shard_of_execution
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import EventKind, ExecutionView, FollowEvent
from valohai_dagster.executions.submissions import Submission
from valohai_dagster.executions.views import view_of
from valohai_dagster.records.engine import Records, open_records
from valohai_dagster.settings import Settings, load_settings

log = logging.getLogger(__name__)
T = TypeVar("T")

FOLLOW_BLOCK_MS = 1_000  # how long one read of the stream waits
LOOK_SECONDS = (
    3.0  # silence after which we look whether there is a conductor; costs two file accesses
)
NO_ANSWER = "the execution service does not answer, waiting: %s"
RESUBMIT_SECONDS = 30.0  # silence after which the execution is asked for again


class ExecutionClient:
    """Talks to the execution service through Redis; reads finished things from the records.

    In the embedded default, `open` starts Redis and the service when they do not run.
    """

    def __init__(
        self, settings: Settings, broker: redis.Redis, records: Records, keys: Keys
    ) -> None:
        self.settings = settings
        self.records = records
        self._redis = broker
        self._keys = keys
        self._specs: dict[str, ExecutionSpec] = {}

    @classmethod
    def open(cls, settings: Settings | None = None) -> ExecutionClient:
        """Raises `ServiceUnavailable` with the next step when a part cannot be reached."""
        settings = settings or load_settings()
        records = open_records(settings)
        apply_settings(settings)
        ensure_conductor(settings)
        return cls(settings, connect(settings), records, Keys(records.deployment_id))

    def close(self) -> None:
        """Lets go of Redis and the records; executions go on."""
        self._redis.close()
        self.records.close()

    def submit(self, spec: ExecutionSpec) -> None:
        """Hands the execution over; doing it twice is the same as once."""
        ensure_conductor(self.settings)  # the one that `open` met may have ended idle since
        spec = seal_credentials(spec, lambda: load_secret_key(self.settings))
        self._specs[spec.execution_id] = spec
        shard = self.records.shard_of(spec.run_id or spec.execution_id)
        self._send(shard, Submission(kind="execute", execution_id=spec.execution_id, spec=spec))

    def stop(self, execution_id: str, *, hard: bool = False, reason: str = "") -> None:
        """Asks for a stop (K-54); a second one is a hard stop (L-20). Progress is told to followers."""
        stop = Submission(kind="stop", execution_id=execution_id, hard=hard, reason=reason)
        self._send(self._shard(execution_id), stop)

    def _shard(self, execution_id: str) -> int:
        """Where it belongs; one that nobody has created yet waits where its spec was sent to."""
        spec = self._specs.get(execution_id)
        if spec is not None:
            return self.records.shard_of(spec.run_id or execution_id)
        with self.records.read() as conn:
            found = shard_of_execution(conn, execution_id)
        return self.records.shard_of(execution_id) if found is None else found

    def view(self, execution_id: str) -> ExecutionView | None:
        with self.records.read() as conn:
            return view_of(conn, execution_id, datum_url=self.settings.datum_url)

    def follow(self, execution_id: str) -> Iterator[FollowEvent | None]:
        """Yields the execution's events up to and including `final`; `None` about once a second of silence.

        The `None` ticks give the caller a moment for its own business, such as noticing an interrupt. An event
        may come twice after a restart of the service. Outages of Redis are waited out. Where another execution
        continues this one (L-32), its events follow, and the `final` is that of the last one.
        """
        stream, last, silent = self._keys.follow(execution_id), "0-0", 0.0
        while True:
            batch = self._read(stream, last)
            if not batch:
                silent += FOLLOW_BLOCK_MS / 1000
                if silent % LOOK_SECONDS == 0:
                    self._revive_conductor()
                if silent >= RESUBMIT_SECONDS:
                    silent = 0.0
                    last = self._ask_again(execution_id, last)
                yield None
                continue
            silent = 0.0
            for entry_id, fields in batch:
                last = entry_id
                event = FollowEvent.model_validate_json(fields["e"])
                following = event.data.get("continued_by")
                if event.kind is not EventKind.final or following is None:
                    yield event
                if event.kind is EventKind.final:
                    if following is not None:
                        yield _handed_on(event)
                        yield from self._follow_next(execution_id, following)
                    return

    def _follow_next(self, execution_id: str, following: str) -> Iterator[FollowEvent | None]:
        """The execution that continues it, known by what was asked for."""
        spec = self._specs.get(execution_id)
        if spec is not None:
            self._specs[following] = spec.model_copy(update={"execution_id": following})
        return self.follow(following)

    def _revive_conductor(self) -> None:
        """One that was killed is replaced; the new one goes on from the records."""
        try:
            ensure_conductor(self.settings)
        except ServiceUnavailable as error:
            log.warning(NO_ANSWER, error, extra={"action": "outage", "step": "follow"})

    def _read(self, stream: str, last: str) -> list[tuple[str, dict[str, str]]]:
        reply: Any = self._patiently(
            lambda: self._redis.xread({stream: last}, count=200, block=FOLLOW_BLOCK_MS)
        )
        return reply[0][1] if reply else []

    def _ask_again(self, execution_id: str, last: str) -> str:
        """After a long silence: is the service still there, and did it miss us? A fresh snapshot tells."""
        try:
            spec = self._specs.get(execution_id)
            if spec is not None:
                self.submit(spec)
        except ServiceUnavailable as error:
            log.warning(NO_ANSWER, error, extra={"action": "outage", "step": "follow"})
        # An emptied Redis starts its stream ids anew, below `last`.
        newest: Any = self._patiently(
            lambda: self._redis.xrevrange(self._keys.follow(execution_id), count=1)
        )
        return last if newest and _entry_id(newest[0][0]) >= _entry_id(last) else "0-0"

    def _send(self, shard: int, submission: Submission) -> None:
        entry: Any = {"s": submission.model_dump_json()}
        try:
            self._redis.xadd(self._keys.submissions(shard), entry)
        except redis.RedisError as error:
            raise BrokerUnavailable(
                f"cannot hand execution {submission.execution_id} over: Redis does not take it ({error}); "
                "run `valohai-dagster doctor` and launch again"
            ) from error

    def _patiently(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            text = "Redis is away (%s); the execution goes on without us, waiting"
            log.warning(text, error, extra={"action": "outage", "step": "follow"})
            time.sleep(FOLLOW_BLOCK_MS / 1000)
            return None


def _handed_on(final: FollowEvent) -> FollowEvent:
    """The end of an execution that another one continues is no end for those who follow it."""
    data = {"continued_by": final.data["continued_by"]}
    return final.model_copy(update={"kind": EventKind.state, "data": data, "view": None})


def _entry_id(text: str) -> tuple[int, int]:
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number)
