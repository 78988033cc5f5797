"""What every kind of registry gives: a name and a password or token, with its end if it has one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from valohai_dagster.executions.registries.names import states_host

LONGEST_MARGIN = timedelta(
    minutes=15
)  # a token is used until then before its end: pulls take their time


@dataclass(frozen=True, kw_only=True)
class Token:
    username: str
    password: str = field(repr=False)
    minted_at: datetime
    expires_at: datetime | None = None

    def is_good(self, now: datetime) -> bool:
        """Whether a pull that begins now can use it to its end, as far as one can tell."""
        if self.expires_at is None:
            return True
        margin = min(LONGEST_MARGIN, (self.expires_at - self.minted_at) / 4)
        return now < self.expires_at - margin


class MintFailure(Exception):
    """No token could be had; `hint` says what to check. Neither holds a secret."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def require_own_host(registry: str, own: re.Pattern[str], *, match: str, whose: str) -> None:
    """Before anything is minted: a token goes to the cloud's own hosts, and to a host that the entry states in full.

    Any other host may be somebody else's that an image's name has slipped past a wildcard. Raises `MintFailure`.
    """
    if own.fullmatch(registry) is None and not states_host(match, registry):
        raise MintFailure(
            f"{registry} is no registry of {whose}, so it gets no token",
            f"check the image's name; a registry with another name must be stated in match without wildcards: "
            f'match = "{registry}/*"',
        )
