"""The Dagster instances whose runs a conductor drives, opened as their launchers described them.

A description may hold a password that somebody wrote into dagster.yaml, so the records keep it encrypted and Redis
never sees it.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any

from dagster import DagsterInstance

from valohai_dagster.data.secrets import load_secret_key
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.plugin.compat import instance_id
from valohai_dagster.plugin.compat.engine import (
    InstanceRef,
)
from valohai_dagster.plugin.compat.storage import (
    is_database_outage,
    pooled,
    reference_is_gone,
    steady_schema,
)
from valohai_dagster.plugin.driver.lanes import LANES, InstanceGone
from valohai_dagster.records.store import get_fact, set_fact

if TYPE_CHECKING:
    from valohai_dagster.records.engine import Records
    from valohai_dagster.settings import Settings

log = logging.getLogger(__name__)

FACT = "instance:"  # and the instance's id


def describe(records: Records, settings: Settings, instance: DagsterInstance) -> str:
    """Keeps what a conductor needs to open the same storage; returns the instance's id.

    Raises `ConfigurationError` for an instance that only lives in this process.
    """
    if instance.is_ephemeral:
        raise ConfigurationError(
            "this Dagster instance lives in one process's memory, so no other process can write to it; set "
            "DAGSTER_HOME, or run the job in this process"
        )
    name = instance_id(instance)
    key = load_secret_key(settings)
    reference = instance.get_ref().to_dict()
    with records.write() as connection:
        kept = get_fact(connection, FACT + name)
        if kept is None or key.decrypt_json(bytes.fromhex(kept)) != json.loads(
            json.dumps(reference)
        ):
            set_fact(connection, FACT + name, key.encrypt_json(reference).hex())
    return name


class Instances:
    """Opened once each, with pooled connections; used by all lanes."""

    def __init__(self, records: Records, settings: Settings) -> None:
        self._records, self._settings = records, settings
        self._open: dict[str, DagsterInstance] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> DagsterInstance:
        """Blocks. Raises `ConfigurationError` when it cannot be opened here, `InstanceGone` when it was deleted."""
        with self._lock:
            if name not in self._open:
                self._open[name] = self._load(name)
            return self._open[name]

    def close(self) -> None:
        for instance in self._open.values():
            instance.dispose()

    def _load(self, name: str) -> DagsterInstance:
        with self._records.read() as connection:
            kept = get_fact(connection, FACT + name)
        if kept is None:
            raise ConfigurationError(
                f"the records do not describe Dagster instance {name}; was its launcher older?"
            )
        reference: dict[str, Any] = load_secret_key(self._settings).decrypt_json(
            bytes.fromhex(kept)
        )
        described = InstanceRef.from_dict(reference)
        if reference_is_gone(described):
            raise InstanceGone(f"the directory of Dagster instance {name} is not there any more")
        try:
            instance = DagsterInstance.from_ref(described)
            found = instance_id(instance)
        except Exception as error:
            if is_database_outage(error):
                raise
            raise ConfigurationError(
                f"Dagster instance {name} cannot be opened from here: {error}; the conductor needs the same "
                "packages, paths and environment variables as the webserver"
            ) from error
        if found != name:
            raise ConfigurationError(
                f"the storage of Dagster instance {name} is not reachable from here: another one, {found}, is in "
                "its place; is DAGSTER_HOME on a disk that this host does not share?"
            )
        pooled(instance, LANES)
        steady_schema(instance)
        return instance
