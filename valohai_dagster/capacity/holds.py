"""What follows from a no of the cloud: for how long nothing more is asked for, and where. Pure.

A hold's length doubles with every refusal in a row, within the limits of its kind of trouble. One that has ended stays
remembered for a while, so that the next refusal goes on from it. Two kinds have names of their own in place of a zone,
because they are about the group and must not replace each other: machines that never checked in, and lists that failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta

from valohai_dagster.capacity.clouds.base import CloudError, Trouble
from valohai_dagster.capacity.model import Hold, Intent, Machine, Purchase

CHECK_IN = "(check-in)"
LISTING = "(listing)"
_GROUP_WIDE = (CHECK_IN, LISTING)

_FIRST_AND_MOST = {
    Trouble.capacity: (timedelta(seconds=60), timedelta(minutes=5)),
    Trouble.quota: (timedelta(seconds=60), timedelta(minutes=5)),
    Trouble.throttled: (timedelta(seconds=5), timedelta(minutes=2)),
    Trouble.credentials: (timedelta(seconds=30), timedelta(minutes=5)),
    Trouble.invalid: (timedelta(seconds=30), timedelta(minutes=5)),
    Trouble.outage: (timedelta(seconds=5), timedelta(minutes=2)),
}
_FLEETING = re.compile(
    r"(\d{4}-\d\d-\d\d[T ])?\d{1,2}:\d\d(:\d\d(\.\d+)?)?Z?"
    r"|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
)
_FORGOTTEN_AFTER = timedelta(hours=1)  # of its end
NEVER_CHECKED_IN = 3  # in a row (E-07)
_CHECK_IN_HOLD = timedelta(minutes=10)


def hold_after(error: CloudError, before: Iterable[Hold], now: datetime) -> Hold:
    """For what the error is about: its zone and purchase, where None means all."""
    return _hold(error, error.zone, error.purchase, before, now)


def hold_of_lists(error: CloudError, before: Iterable[Hold], now: datetime) -> Hold:
    """The cloud could not say what there is."""
    return _hold(error, LISTING, None, before, now)


def hold_of_check_ins(before: Iterable[Hold], machine_id: str, now: datetime) -> Hold:
    """Counts a machine that never checked in; from the third in a row on nothing is launched for ten minutes (E-07)."""
    old = find(before, CHECK_IN, None)
    failures = 1 + (old.failures if old and now - old.until < _FORGOTTEN_AFTER else 0)
    return Hold(
        zone=CHECK_IN,
        until=now + _CHECK_IN_HOLD if failures >= NEVER_CHECKED_IN else now,
        reason=f"{failures} machines in a row never checked in, the last one {machine_id}: its start-up log tells why"
        " (/var/log/cloud-init-output.log there, `docker logs` of a container); it has to reach join_url and Redis",
        failures=failures,
    )


def hold_of_withdrawn(before: Iterable[Hold], machine: Machine, now: datetime) -> Hold:
    """The cloud accepted a launch and ended the machine before it ran, without a word of why."""
    place = f"{machine.zone}, {machine.purchase.value}" if machine.zone else machine.purchase.value
    error = CloudError(
        f"launches are accepted and ended by the cloud before they run ({place})",
        code="withdrawn",
        trouble=Trouble.capacity,
        zone=machine.zone or None,
        purchase=machine.purchase,
    )
    return hold_after(error, before, now)


def in_force(holds: Iterable[Hold], now: datetime) -> tuple[Hold, ...]:
    """Those that hold now, as the planner knows them: those about the whole group have no zone."""
    return tuple(
        replace(hold, zone=None) if hold.zone in _GROUP_WIDE else hold
        for hold in holds
        if hold.until > now
    )


def unanswered(holds: Iterable[Hold], launches: Iterable[Intent], now: datetime) -> str | None:
    """In words, what the plan does not know of: a list that failed, or a launch that may have had its effect or not."""
    launches = list(launches)
    for hold in holds:
        about = hold.zone == LISTING or any(covers(hold, i.zone, i.purchase) for i in launches)
        if about and hold.until > now:
            return f"{hold.reason}; tried again at {hold.until:%H:%M:%S} UTC"
    return None


def find(holds: Iterable[Hold], zone: str | None, purchase: Purchase | None) -> Hold | None:
    return next((one for one in holds if (one.zone, one.purchase) == (zone, purchase)), None)


def covers(hold: Hold, zone: str, purchase: Purchase) -> bool:
    """Whether it is about launches of this zone and purchase."""
    return hold.zone in (None, zone) and hold.purchase in (None, purchase)


def gist(reason: str) -> str:
    """What stays when the same refusal comes again: no times, and no ids of requests."""
    return _FLEETING.sub("", reason)


def _hold(
    error: CloudError,
    zone: str | None,
    purchase: Purchase | None,
    before: Iterable[Hold],
    now: datetime,
) -> Hold:
    old = find(before, zone, purchase)
    failures = 1 + (old.failures if old and now - old.until < _FORGOTTEN_AFTER else 0)
    first, most = _FIRST_AND_MOST[error.trouble]
    wait = min(first * 2 ** min(failures - 1, 10), most)
    if error.retry_after is not None:
        wait = max(wait, timedelta(seconds=error.retry_after))
    return Hold(
        zone=zone,
        purchase=purchase,
        until=now + wait,
        reason=str(error).rstrip("."),
        failures=failures,
    )
