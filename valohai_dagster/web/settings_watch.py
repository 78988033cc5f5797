"""The settings that a conductor runs with, and what it does when their file changes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from valohai_dagster.embedded.conductor import ConductorInfo, announce
from valohai_dagster.embedded.settings_in_use import differing, digests, file_stamp
from valohai_dagster.errors import ValohaiError
from valohai_dagster.settings import Settings, find_config, load_settings

log = logging.getLogger(__name__)


SETTLE_SECONDS = 0.1  # for a file that is just being written: many editors empty it first


class InUse:
    """`on_demand`: clients start this conductor, so that it may end for a successor with other settings."""

    def __init__(self, settings: Settings, *, on_demand: bool) -> None:
        self._settings, self._digests = settings, digests(settings)
        self._on_demand = on_demand
        # The file may have changed since the settings were read, so that its state now says nothing of them.
        self._stamp = self._told = ""
        self._looked = False
        self._trouble = ""
        self._others: list[str] = []  # names of settings
        self._same_place = True

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
        self._told = self._stamp

    async def until_changed(self, busy: Callable[[], bool], *, every: float) -> None:
        """Until the settings are others and nothing runs. Where nobody starts conductors on demand, for ever.

        Whatever is wrong with the file, or with telling others, is logged and looked at again.
        """
        while True:
            await asyncio.sleep(every)
            try:
                await self._settle()
                if self._on_demand and self._differ and not busy():
                    return
                if self._told != self._stamp:
                    self.announce()
            except ValohaiError as error:
                self._warn(f"the settings stay as they were: {error}")
            except OSError as error:
                self._warn(f"cannot tell which settings are in use, which is tried again: {error}")
            else:
                self._trouble = ""

    async def _settle(self) -> None:
        seen = False
        while self._look():
            seen = True
            await asyncio.sleep(SETTLE_SECONDS)
        if seen and self._others:
            names = ", ".join(self._others)
            log.info("other settings now: %s", names, extra={"action": "settings"})

    @property
    def _differ(self) -> bool:
        """Whether a successor would have other settings, and would serve the same state directory."""
        return bool(self._others) and self._same_place

    def _look(self) -> bool:
        """Whether the file is another than at the last look. Raises ConfigurationError."""
        stamp = file_stamp(
            find_config()
        )  # before it is read: a later change is seen at the next look
        if self._looked and stamp == self._stamp:
            return False
        fresh = load_settings()
        self._looked, self._stamp = True, stamp
        self._others = differing(fresh, self._digests)
        self._same_place = fresh.state_dir == self._settings.state_dir
        return True

    def _warn(self, text: str) -> None:
        """Once for as long as it stays so."""
        if text != self._trouble:
            self._trouble = text
            log.warning("%s", text, extra={"action": "settings"})
