"""Several connections that share the work on one file; the first is the caller's own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from valohai_agent.transfers.pace import MOST_PER_FILE, Shared


class Abandoned(Exception):
    """Another connection of the file has failed for good."""


class Crew:
    """`work` takes pieces until none is left. The first failure ends all and is what `run` raises."""

    def __init__(self, shared: Shared, work: Callable[[], None]) -> None:
        self._shared = shared
        self._work = work
        self._lock = threading.Lock()
        self._helpers: list[threading.Thread] = []
        self._error: Exception | None = None

    def run(self) -> None:
        self._do()
        while True:  # helpers may still bring helpers
            with self._lock:
                helper = self._helpers.pop() if self._helpers else None
            if helper is None:
                break
            helper.join()
        if self._error is not None:
            raise self._error

    def add(self) -> None:
        """Brings a further connection, if this file and the transferer have a place for it."""
        with self._lock:
            if self._error or len(self._helpers) + 1 >= MOST_PER_FILE:
                return
            if not self._shared.take_helper():
                return
            helper = threading.Thread(target=self._help, name="transfer", daemon=True)
            self._helpers.append(helper)
            helper.start()

    def check(self) -> None:
        """Raises when the work is pointless."""
        self._shared.check()
        if self._error is not None:
            raise Abandoned

    def _help(self) -> None:
        try:
            self._do()
        finally:
            self._shared.give_helper_back()

    def _do(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - whatever it is, `run` raises it
            with self._lock:
                if self._error is None and not isinstance(error, Abandoned):
                    self._error = error
