"""The launcher's side of the hand-over: a row in the records, RUN_START, and word to the conductor."""

from __future__ import annotations

import logging
import threading
import uuid
from typing import Any

import redis
from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus
from sqlalchemy.exc import SQLAlchemyError

from valohai_agent.protocol import Keys, utcnow
from valohai_dagster.broker.connection import connect
from valohai_dagster.embedded.conductor import ensure_conductor, running_conductor
from valohai_dagster.embedded.settings_in_use import differing, digests, file_stamp
from valohai_dagster.errors import ConfigurationError, ValohaiError
from valohai_dagster.executions.why_reader import Sources
from valohai_dagster.plugin.compat.engine import (
    BaseWorkspaceRequestContext,
)
from valohai_dagster.plugin.compat.storage import pooled, steady_schema
from valohai_dagster.plugin.driver import handed_over
from valohai_dagster.plugin.driver.events import RunEvents
from valohai_dagster.plugin.driver.facts import facts_of
from valohai_dagster.plugin.driver.handover import freeze
from valohai_dagster.plugin.driver.instances import describe
from valohai_dagster.plugin.why_run import why_run
from valohai_dagster.records.engine import open_records
from valohai_dagster.settings import find_config, load_settings

log = logging.getLogger(__name__)

CONNECTIONS = 4  # to Dagster's storage that a launching process keeps, per storage
REVIVE_SECONDS = 3.0  # between two looks whether the conductor is there
MORE_CONNECTIONS = 40  # in a rush: a daemon launches from many threads


class HandingOver:
    """Records and Redis of the deployment that the settings name as they are when it is made."""

    def __init__(self, instance: DagsterInstance) -> None:
        steady_schema(instance)
        pooled(instance, CONNECTIONS, overflow=MORE_CONNECTIONS)
        self._instance = instance
        self._stamp = file_stamp(find_config())  # before it is read: a later change is seen
        self._settings = load_settings()
        self._in_use = digests(self._settings)
        self._records = open_records(self._settings)
        ensure_conductor(self._settings)
        self._redis = connect(self._settings)
        self._keys = Keys(self._records.deployment_id)
        self._instance_id: str | None = None
        self._closed = threading.Event()
        self._reviver: threading.Thread | None = None

    def close(self) -> None:
        self._closed.set()
        self._redis.close()
        self._records.close()

    def is_outdated(self) -> bool:
        """Whether the settings are others now. A file that cannot be read, such as one half written, changes nothing."""
        try:
            stamp = file_stamp(find_config())
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            return bool(differing(load_settings(), self._in_use))
        except ConfigurationError as error:
            log.warning("the settings stay as they were: %s", error, extra={"action": "settings"})
            return False

    def launch(self, run: DagsterRun, workspace: BaseWorkspaceRequestContext | None) -> None:
        """Hands the run over. Doing it twice is the same as once.

        The row comes first: from then on the run is driven whatever happens to this process. RUN_START is written
        here, so that no time-out for starting runs applies to one that waits for a machine (DAGSTER_NOTES 8).
        """
        ensure_conductor(self._settings)
        if self._instance_id is None:
            self._instance_id = describe(self._records, self._settings, self._instance)
        assets = {
            AssetKey(list(facts.tag.asset_key)).to_user_string(): facts.tag.parents
            for facts in facts_of(self._instance, run).steps.values()
        }
        handover = freeze(self._instance, run, self._instance_id, assets, workspace)
        shard = self._records.shard_of(run.run_id)
        with self._records.write() as connection:
            new = handed_over.record(connection, handover, shard=shard, now=utcnow())
        now = self._instance.get_run_by_id(run.run_id) if new else None
        if now is not None and now.status is DagsterRunStatus.STARTING:  # not cancelled meanwhile
            for entry in RunEvents(run.job_name, run.run_id).start():
                self._instance.handle_new_event(entry)
        self._send("launch", run.run_id)
        self._keep_conductor()

    def _keep_conductor(self) -> None:
        """In the embedded default, a conductor that is killed with runs in hand is started again from here."""
        elsewhere = self._settings.redis_url is not None and not self._settings.start_conductor
        if self._reviver is None and not elsewhere:
            self._reviver = threading.Thread(target=self._revive, name="conductor", daemon=True)
            self._reviver.start()

    def _revive(self) -> None:
        while not self._closed.wait(REVIVE_SECONDS):
            try:
                if running_conductor(self._settings) is None and self._has_work():
                    ensure_conductor(self._settings)
            except (ValohaiError, SQLAlchemyError, OSError) as error:
                log.warning("no conductor: %s", error, extra={"action": "outage"})

    def _has_work(self) -> bool:
        with self._records.read() as connection:
            return bool(handed_over.driving(connection, range(self._records.shards)))

    def terminate(self, run_id: str) -> None:
        self._send("terminate", run_id)

    def remind(self, run_id: str) -> None:
        self._send("launch", run_id)

    def has_ended(self, run_id: str) -> bool:
        with self._records.read() as connection:
            rows = handed_over.find(connection, [run_id])
        return bool(rows) and rows[0].state == handed_over.RunState.ended.value

    def explain(self, run: DagsterRun) -> str:
        """What the run waits for or does, in words."""
        sources = Sources(
            records=self._records, broker=self._redis, keys=self._keys, settings=self._settings
        )
        return str(why_run(self._instance, run, sources))

    def _send(self, kind: str, run_id: str) -> None:
        """The conductor also looks by itself, within half a minute, so a Redis that is away only delays."""
        stream = self._keys.runs(self._records.shard_of(run_id))
        message: Any = {"kind": kind, "run_id": run_id, "request": uuid.uuid4().hex}
        try:
            self._redis.xadd(stream, message)
        except redis.RedisError as error:
            text = "Redis is away (%s); the conductor takes up run %s when it is back"
            log.warning(text, error, run_id, extra={"action": "hand-over", "run": run_id})
