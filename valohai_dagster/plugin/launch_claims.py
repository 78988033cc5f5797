"""Who launches a run: a short claim in Redis, so that two submits of one run launch it once.

Dagster's storage has no compare-and-set on a run's status. Once the run is STARTING its status says enough; the claim
covers the moment before, and expires in case its holder dies in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from threading import Lock

import redis

from valohai_agent.protocol import Keys
from valohai_dagster.broker.connection import broker_url, connect, explain
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import Settings, load_settings

CLAIM_SECONDS = 15  # longer than a slow database takes to write one event


class LaunchClaims:
    """Connects on first use; threads may share it."""

    def __init__(self, settings: Callable[[], Settings] = load_settings) -> None:
        self._settings = settings
        self._lock = Lock()
        self._opened: tuple[redis.Redis, Keys] | None = None

    def take(self, run_id: str) -> bool:
        """Whether the launch is the caller's now. Raises errors of `valohai_dagster.errors`."""
        token = secrets.token_hex(8)
        try:
            return self._take(run_id, token)
        except redis.RedisError:
            self.close()  # the embedded server may have ended idle; connecting starts it again
        try:
            return self._take(run_id, token)
        except redis.RedisError as error:
            raise explain(error, broker_url(self._settings())) from error

    def close(self) -> None:
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened[0].close()

    def _take(self, run_id: str, token: str) -> bool:
        client, keys = self._open()
        key = keys.launching(run_id)
        taken = client.set(key, token, nx=True, ex=CLAIM_SECONDS)
        return bool(taken) or client.get(key) == token  # the answer to a first try may be lost

    def _open(self) -> tuple[redis.Redis, Keys]:
        with self._lock:
            if self._opened is None:
                settings = self._settings()
                records = open_records(settings)
                records.close()
                self._opened = connect(settings), Keys(records.deployment_id)
            return self._opened
