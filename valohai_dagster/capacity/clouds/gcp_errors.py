"""What the refusals of Google Compute Engine mean for a worker group: pure tables, from its codes.

It has two sets of words: reasons of HTTP answers (`quotaExceeded`) and codes of operations that failed later
(`QUOTA_EXCEEDED`). Both are here; what neither knows is judged by its HTTP status.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.clouds.refusals import Scope


class Meaning(NamedTuple):
    trouble: Trouble
    scope: Scope


_CAPACITY = Meaning(Trouble.capacity, Scope.zone)
_QUOTA = Meaning(Trouble.quota, Scope.purchase)  # spot machines have a quota of their own
_THROTTLED = Meaning(Trouble.throttled, Scope.group)
_CREDENTIALS = Meaning(Trouble.credentials, Scope.group)
_INVALID = Meaning(Trouble.invalid, Scope.group)
_OUTAGE = Meaning(Trouble.outage, Scope.group)

CODES: dict[str, Meaning] = {
    "ZONE_RESOURCE_POOL_EXHAUSTED": _CAPACITY,
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS": _CAPACITY,
    "RESOURCE_POOL_EXHAUSTED": _CAPACITY,
    "STOCKOUT": _CAPACITY,
    "resourcePoolExhausted": _CAPACITY,
    "IP_SPACE_EXHAUSTED": Meaning(Trouble.capacity, Scope.group),
    "IP_SPACE_EXHAUSTED_WITH_DETAILS": Meaning(Trouble.capacity, Scope.group),
    "QUOTA_EXCEEDED": _QUOTA,
    "quotaExceeded": _QUOTA,
    "limitExceeded": _QUOTA,
    "RATE_LIMIT_EXCEEDED": _THROTTLED,
    "rateLimitExceeded": _THROTTLED,
    "userRateLimitExceeded": _THROTTLED,
    "concurrentLimitExceeded": _THROTTLED,
    "CONCURRENT_OPERATIONS_QUOTA_EXCEEDED": _THROTTLED,
    "authError": _CREDENTIALS,
    "forbidden": _CREDENTIALS,
    "insufficientPermissions": _CREDENTIALS,
    "required": _INVALID,
    "accessNotConfigured": _CREDENTIALS,
    "PERMISSIONS_ERROR": _CREDENTIALS,
    "SERVICE_ACCOUNT_ACCESS_DENIED": _CREDENTIALS,
    "BILLING_DISABLED": _CREDENTIALS,
    "notFound": _INVALID,
    "invalid": _INVALID,
    "badRequest": _INVALID,
    "conditionNotMet": _INVALID,  # policies of the organization
    "CONDITION_NOT_MET": _INVALID,
    "RESOURCE_NOT_FOUND": _INVALID,
    "INVALID_FIELD_VALUE": _INVALID,
    "INVALID_USAGE": _INVALID,
    "UNSUPPORTED_OPERATION": Meaning(Trouble.invalid, Scope.zone),  # such as a GPU that it lacks
    "resourceNotReady": _OUTAGE,
    "RESOURCE_NOT_READY": _OUTAGE,
    "backendError": _OUTAGE,
    "internalError": _OUTAGE,
    "INTERNAL_ERROR": _OUTAGE,
    "SERVICE_UNAVAILABLE": _OUTAGE,
}

STATUSES: dict[int, Meaning] = {
    400: _INVALID,
    401: _CREDENTIALS,
    403: _CREDENTIALS,
    404: _INVALID,
    409: _OUTAGE,  # somebody else changes the same thing: try again
    412: _INVALID,
    429: _THROTTLED,
}

ADVICE: dict[Trouble, str] = {
    Trouble.capacity: "The group's other zones are tried meanwhile.",
    Trouble.quota: "Ask Google for more quota (IAM & Admin, Quotas) or lower max_machines.",
    Trouble.throttled: "Fewer calls are made for a while.",
    Trouble.credentials: "Check credentials_file, and the account's permissions in docs/clouds.md.",
    Trouble.invalid: "Change the group's settings; `valohai-dagster groups check` looks at each.",
    Trouble.outage: "Check endpoint_url and the network if it stays.",
}

_CALL = re.compile(r"^(GET|POST|PUT|PATCH|DELETE) \S+: ")


def meaning_of(code: str, status: int | None = None) -> Meaning:
    """`status`: of the HTTP answer, None when none came."""
    known = CODES.get(code)
    if known is not None:
        return known
    return STATUSES.get(status or 0, _OUTAGE)


def words_of(message: str) -> str:
    """Without the address that the client library puts before it, and short."""
    text = _CALL.sub("", " ".join(message.split())).rstrip(". ")
    return text if len(text) <= 400 else text[:400] + "..."
