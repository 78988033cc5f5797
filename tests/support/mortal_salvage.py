"""A conductor that is killed (SIGKILL) when it has stored the first log of an attempt and has not recorded it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import BinaryIO

from tests.support.service import running_service
from valohai_dagster.settings import Settings
from valohai_dagster.stores.base import ObjectStat
from valohai_dagster.stores.local import LocalStore


def salvage_and_die(settings: Settings) -> None:
    """In a process of its own, since it ends like this."""
    process = multiprocessing.get_context("spawn").Process(target=_salvage, args=(settings,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def _salvage(settings: Settings) -> None:
    put = LocalStore.put

    def last(self: LocalStore, key: str, content: BinaryIO | bytes) -> ObjectStat:
        stored = put(self, key, content)
        os.kill(os.getpid(), signal.SIGKILL)
        return stored

    LocalStore.put = last
    with running_service(settings) as service:
        while True:
            service.call(lambda running: running.late_logs.look())
