"""Which failure is worth another try, and after which pause. Decides; does nothing."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from valohai_agent.errors import (
    Conflict,
    Denied,
    DiskFull,
    NotFound,
    Refused,
    TransferError,
    Unreachable,
)

SILENT_TRIES = 3  # with a server that has never answered anything
PROGRESS_BYTES = 64 * 1024  # fewer bytes than that since the last failures are no progress
BACK_OFF_SECONDS = 0.5  # first pause; doubles, times a random factor of 0.5..1.5
MAX_BACK_OFF_SECONDS = 30.0
TEMPORARY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
TEMPORARY_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "ServerBusy"}
)
EXPIRED_STATUS = frozenset({401, 403})
EXPIRED_CODES = frozenset({"ExpiredToken", "RequestExpired", "TokenRefreshRequired"})
CONFLICT_CODES = frozenset({"UnauthorizedBlobOverwrite"})  # Azure: the signature may only create
STATUS_ERRORS: dict[int, type[TransferError]] = {
    401: Denied,
    403: Denied,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    412: Conflict,
    507: DiskFull,
}
CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
T = TypeVar("T")


class Temporary(Exception):
    """A failure worth another try, with the pause that the server asked for."""

    def __init__(self, reason: str, pause_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds


class Silent(Temporary):
    """A server that has never answered anything did not answer within `seconds`; the next try may take `longest`."""

    def __init__(self, seconds: float, longest: float, place: Any = None) -> None:
        super().__init__(f"no answer within {seconds:g} s")
        self.longest, self.place = longest, place


class Expired(Exception):
    """The other side refuses the signature: worth a fresh one, once; else `error` is what to raise."""

    def __init__(self, error: TransferError) -> None:
        super().__init__(str(error))
        self.error = error


class Changed(Exception):
    """The content behind the URL is not the one that the transfer began with."""


def status_error(
    status: int, reason: str, headers: Mapping[str, str], host: str, name: str, body: bytes = b""
) -> Exception:
    """What an answer that is no success means: Temporary, Expired or the TransferError to raise.

    `body` is searched for the error code of S3 and Azure. Its text is never shown: it may quote the URL.
    """
    found = CODE.search(body)
    code = found.group(1).decode() if found else ""
    words = " ".join(word for word in (f"HTTP {status}", reason, code and f"({code})") if word)
    words += f" from {host}"
    if status in TEMPORARY_STATUS or code in TEMPORARY_CODES:
        return Temporary(words, retry_after(headers))
    kind = Conflict if code in CONFLICT_CODES else STATUS_ERRORS.get(status, Refused)
    error = kind(f"{name}: {words}")
    if kind is Conflict:
        return error
    if status in EXPIRED_STATUS or code in EXPIRED_CODES:
        return Expired(error if isinstance(error, Denied) else Denied(str(error)))
    return error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, by number or date, at most MAX_BACK_OFF_SECONDS."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, min(seconds, MAX_BACK_OFF_SECONDS))


def back_off(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    longest = min(MAX_BACK_OFF_SECONDS, BACK_OFF_SECONDS * 2 ** (failures - 1))
    return longest * random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, protects nothing


class Retries:
    """Repeats one action until it succeeds, fails for good, or fails `attempts` times in a row without progress.

    A server that never answers has SILENT_TRIES of them; `gave_up` hears of it then. `waiting` hears before each pause
    what failed, which try it was, and when the next one is.
    """

    def __init__(
        self,
        *,
        attempts: int,
        sleep: Callable[[float], Any],
        check: Callable[[], None],
        name: str,
        waiting: Callable[[str], None] = lambda text: None,
        gave_up: Callable[[Silent], None] = lambda error: None,
    ) -> None:
        self._attempts, self._sleep, self._check, self._name = attempts, sleep, check, name
        self._silent_tries = min(attempts, SILENT_TRIES)
        self._waiting, self._gave_up = waiting, gave_up

    def run(
        self,
        action: Callable[[], T],
        *,
        progress: Callable[[], int] = lambda: 0,
        renew: Callable[[], bool] = lambda: False,
    ) -> T:
        """`progress` tells how far the action is, in bytes: tries that moved it on by PROGRESS_BYTES start the count anew.

        `renew` gets a fresh signature and says whether there is one; asked once per run without progress.
        """
        failures, silences, renewed, before = 0, 0, False, progress()
        while True:
            self._check()
            try:
                return action()
            except Temporary as error:
                if progress() - before >= PROGRESS_BYTES:
                    failures, renewed, before = 0, False, progress()
                failures += 1
                silences += isinstance(error, Silent)
                self._give_up_if_due(error, failures, silences)
                pause = back_off(failures) if error.pause_seconds is None else error.pause_seconds
                tries = f"try {failures} of {self._attempts}"
                end = ""
                if isinstance(error, Silent):
                    tries = f"try {silences} of {self._silent_tries}"
                    left = (self._silent_tries - silences) * error.longest
                    end = f", given up in {left:.0f} s if there is none"
                self._waiting(f"{self._name}: {error} ({tries}), next in {pause:.1f} s{end}")
            except Expired as error:
                if progress() - before >= PROGRESS_BYTES:
                    failures, renewed, before = 0, False, progress()
                if renewed or not renew():
                    raise error.error from error
                renewed, pause = True, 0.0
            if pause:
                self._sleep(pause)

    def _give_up_if_due(self, error: Temporary, failures: int, silences: int) -> None:
        silent = silences >= self._silent_tries
        if failures < self._attempts and not silent:
            return
        if silent and isinstance(error, Silent):
            self._gave_up(error)
        raise Unreachable(
            f"{self._name}: {error} (tried {failures} times). "
            "Check that the address can be reached from the worker, then launch again."
        ) from error


class Renewal:
    """A signed request that several connections share; renewed by the first that finds it expired."""

    def __init__(self, first: Any, renew: Callable[[], Any] | None) -> None:
        self.current = first
        self._renew = renew
        self._lock = threading.Lock()

    def renewed(self, used: Any) -> bool:
        """Whether there is another one than `used` by now."""
        if self._renew is None:
            return False
        with self._lock:
            if self.current is used:
                self.current = self._renew()
            return self.current is not used
