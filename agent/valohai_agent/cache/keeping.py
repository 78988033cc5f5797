"""Looks after the cache while its agent has nothing else to do."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from valohai_agent.cache.local import InputCache
from valohai_agent.cache.shared import Share

log = logging.getLogger(__name__)

ROUND_SECONDS = 30.0
SWEEP_SHARE_SECONDS = 3600.0
VERIFY_AFTER_SECONDS = 7 * 86400.0
BYTES_PER_SECOND = 20_000_000  # of reading for verification: a small part of what any disk can do


class Caretaker:
    """A thread: sweeps at its start, the share now and then too, keeps to the limits, and reads old contents again while `idle()`.

    A content that is verified is read at `BYTES_PER_SECOND`, and left as soon as the agent has something to do.
    """

    def __init__(
        self,
        cache: InputCache,
        *,
        idle: Callable[[], bool],
        share: Share | None = None,
        verify_after: float = VERIFY_AFTER_SECONDS,
        round_seconds: float = ROUND_SECONDS,
    ) -> None:
        self._cache, self._share, self._idle = cache, share, idle
        self._verify_after, self._round_seconds = verify_after, round_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        self._cache.sweep()
        share_due = time.monotonic()
        while not self._closed.is_set():
            if time.monotonic() >= share_due:
                self._sweep_share()
                share_due = time.monotonic() + SWEEP_SHARE_SECONDS
            self._cache.make_room()
            while self._may_go_on() and self._verify_one():
                pass
            self._closed.wait(self._round_seconds)

    def _sweep_share(self) -> None:
        if self._share is None:
            return
        trouble = self._share.trouble()
        if trouble is None:
            with contextlib.suppress(OSError):
                self._share.sweep()
            return
        text = "the shared cache %s cannot be used: %s; jobs go without until it can"
        log.warning(text, self._share.directory, trouble, extra={"action": "share-trouble"})

    def _verify_one(self) -> bool:
        return self._cache.verify_oldest(time.time() - self._verify_after, pace=self._pace)

    def _pace(self, size: int) -> bool:
        self._closed.wait(size / BYTES_PER_SECOND)
        return self._may_go_on()

    def _may_go_on(self) -> bool:
        return self._idle() and not self._closed.is_set()
