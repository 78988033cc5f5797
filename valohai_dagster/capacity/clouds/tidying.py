"""Machines that a list finds to be of no use any more are deleted on the way. A cloud that will not have it spoils no list."""

from __future__ import annotations

import logging
from collections.abc import Callable

from valohai_dagster.capacity.clouds.base import CloudError

log = logging.getLogger(__name__)


class Tidying:
    """Of one group. The next list tries again; the same refusal is logged once."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._told: dict[str, str] = {}

    def deleted(self, machine_id: str, delete: Callable[[], None]) -> bool:
        """Whether the cloud took it; `delete` raises CloudError when not."""
        try:
            delete()
        except CloudError as error:
            if self._told.get(machine_id) != str(error):
                self._told[machine_id] = str(error)
                extra = {"action": "tidy", "group": self._group, "machine": machine_id}
                log.warning("%s cannot be deleted: %s", machine_id, error, extra=extra)
            return False
        self._told.pop(machine_id, None)
        return True
