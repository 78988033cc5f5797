"""What refusals of OpenStack's services mean for a worker group: pure tables, from HTTP statuses and sentences.

Nova has few codes of its own. What it finds out after it has accepted a launch is a sentence too, the server's fault.
"""

from __future__ import annotations

from typing import NamedTuple

from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.clouds.refusals import Scope


class Meaning(NamedTuple):
    code: str
    trouble: Trouble
    scope: Scope


# First match wins; all in lower case.
SENTENCES: tuple[tuple[str, Meaning], ...] = (
    ("quota exceeded", Meaning("QuotaExceeded", Trouble.quota, Scope.group)),
    ("exceedsavailablequota", Meaning("QuotaExceeded", Trouble.quota, Scope.group)),
    ("maximum number of ports exceeded", Meaning("PortLimit", Trouble.quota, Scope.group)),
    ("no valid host was found", Meaning("NoValidHost", Trouble.capacity, Scope.zone)),
    ("exceeded maximum number of retries", Meaning("NoValidHost", Trouble.capacity, Scope.zone)),
    ("insufficient compute resources", Meaning("NoValidHost", Trouble.capacity, Scope.zone)),
    ("exhausted all hosts", Meaning("NoValidHost", Trouble.capacity, Scope.zone)),
    ("no more ip addresses", Meaning("NoAddresses", Trouble.capacity, Scope.group)),
    ("no fixed ip addresses", Meaning("NoAddresses", Trouble.capacity, Scope.group)),
    ("availability zone is not available", Meaning("NoSuchZone", Trouble.invalid, Scope.zone)),
    ("image", Meaning("BadImage", Trouble.invalid, Scope.group)),
    ("flavor", Meaning("BadFlavor", Trouble.invalid, Scope.group)),
    ("network", Meaning("BadNetwork", Trouble.invalid, Scope.group)),
)
_ONLY_OF_REFUSED_REQUESTS = ("image", "flavor", "network")

STATUSES: dict[int, Meaning] = {
    400: Meaning("BadRequest", Trouble.invalid, Scope.group),
    401: Meaning("Unauthorized", Trouble.credentials, Scope.group),
    403: Meaning("Forbidden", Trouble.credentials, Scope.group),
    404: Meaning("NotFound", Trouble.invalid, Scope.group),
    409: Meaning("Conflict", Trouble.outage, Scope.group),  # something else is being done to it
    413: Meaning("OverLimit", Trouble.throttled, Scope.group),
    429: Meaning("TooManyRequests", Trouble.throttled, Scope.group),
}

# What the SDK finds out by itself, as if a service had answered so.
_AS_STATUS = {"NotFoundException": 404, "DuplicateResource": 400}

# By name of the exception, where no service has answered.
EXCEPTIONS: dict[str, Meaning] = {
    "ConfigException": Meaning("BadConfiguration", Trouble.credentials, Scope.group),
    "MissingRequiredOptions": Meaning("BadConfiguration", Trouble.credentials, Scope.group),
    "MissingAuthPlugin": Meaning("BadConfiguration", Trouble.credentials, Scope.group),
    "AuthorizationFailure": Meaning("Unauthorized", Trouble.credentials, Scope.group),
    "EndpointNotFound": Meaning("NoSuchRegion", Trouble.invalid, Scope.group),
    "SSLFailure": Meaning("BadCertificate", Trouble.credentials, Scope.group),
}

ADVICE: dict[Trouble, str] = {
    Trouble.capacity: "other `zones` or another `instance_type` in {section} may have room",
    Trouble.quota: "ask for a higher quota of the project, or lower `max_machines` in {section}",
    Trouble.throttled: "fewer calls are made for a while",
    Trouble.credentials: "check the credentials in {section}; docs/clouds.md lists what they need",
    Trouble.invalid: "correct {section}",
    Trouble.outage: "check `auth_url` in {section} and the network",
}


def meaning_of(status: int | None, words: str, *, exception: str = "") -> Meaning:
    """`status` is None when no service has answered, 0 for the fault of a server."""
    if status is None:
        status = _AS_STATUS.get(exception)
    lower = words.lower()
    for sentence, meaning in SENTENCES:
        if sentence in lower and (
            sentence not in _ONLY_OF_REFUSED_REQUESTS or status in (400, 404, 409)
        ):
            return meaning
    if status in STATUSES:
        return STATUSES[status]
    return EXCEPTIONS.get(exception, _unknown(status))


def _unknown(status: int | None) -> Meaning:
    if status == 0:
        return Meaning("ServerFault", Trouble.capacity, Scope.zone)
    code = f"HTTP {status}" if status else "Unreachable"
    return Meaning(code, Trouble.outage, Scope.group)
