"""The settings that a conductor runs with, and what it does when their file changes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from valohai_dagster.embedded.conductor import ConductorInfo, announce
from valohai_dagster.embedded.settings_in_use import differing, digests, file_stamp
from valohai_dagster.errors import ConfigurationError
from valohai_dagster.settings import Settings, load_settings

log = logging.getLogger(__name__)


class InUse:
    """`on_demand`: clients start this conductor, so that it may end for a successor with other settings."""

    def __init__(self, settings: Settings, *, on_demand: bool) -> None:
        self._settings, self._digests = settings, digests(settings)
        self._on_demand = on_demand
        self._stamp = file_stamp(settings.config_file)
        self._trouble = ""
        self._differ = False

    def announce(self) -> None:
        """Tells others the address and the settings in use, and at which state of the file they were looked at."""
        info = ConductorInfo(
            pid=os.getpid(),
            url=self._settings.base_url,
            on_demand=self._on_demand,
            stamp=self._stamp,
            settings=self._digests,
        )
        announce(self._settings, info)

    async def until_changed(self, busy: Callable[[], bool], *, every: float) -> None:
        """Until the settings are others and nothing runs. Where nobody starts conductors on demand, for ever."""
        while True:
            await asyncio.sleep(every)
            seen = self._look()
            if self._on_demand and self._differ and not busy():
                return
            if seen:
                self.announce()

    def _look(self) -> bool:
        """Whether the file is another than at the last look; says what is different, and what is wrong with it."""
        try:
            fresh = load_settings()
        except ConfigurationError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning(
                    "the settings stay as they were: %s", error, extra={"action": "settings"}
                )
            return False
        stamp = file_stamp(fresh.config_file)
        if stamp == self._stamp:
            return False
        self._stamp, self._trouble = stamp, ""
        names = differing(fresh, self._digests)
        self._differ = bool(names) and fresh.state_dir == self._settings.state_dir
        if names:
            log.info("other settings now: %s", ", ".join(names), extra={"action": "settings"})
        return True
