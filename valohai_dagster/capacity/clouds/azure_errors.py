"""What the refusals of Azure mean for a worker group: pure tables, from its codes.

The same codes are in HTTP answers and in the instance view of a machine that could not be made.
"""

from __future__ import annotations

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
_NOT_SO = Meaning(Trouble.invalid, Scope.purchase)  # not as spot
_OUTAGE = Meaning(Trouble.outage, Scope.group)

CODES: dict[str, Meaning] = {
    "AllocationFailed": _CAPACITY,
    "ZonalAllocationFailed": _CAPACITY,
    "OverconstrainedAllocationRequest": _CAPACITY,
    "OverconstrainedZonalAllocationRequest": _CAPACITY,
    "AllocationTimeout": _CAPACITY,
    "SkuNotAvailable": _CAPACITY,  # also the word for no spot capacity
    "SpotPriceGreaterThanProvidedMaxPrice": Meaning(Trouble.capacity, Scope.purchase),
    "SubnetIsFull": Meaning(Trouble.capacity, Scope.group),
    "QuotaExceeded": _QUOTA,
    "ResourceQuotaExceeded": _QUOTA,
    "PublicIPCountLimitReached": Meaning(Trouble.quota, Scope.group),
    "TooManyRequests": _THROTTLED,
    "SubscriptionRequestsThrottled": _THROTTLED,
    "ResourceRequestsThrottled": _THROTTLED,
    "AuthorizationFailed": _CREDENTIALS,
    "LinkedAuthorizationFailed": _CREDENTIALS,
    "AuthenticationFailed": _CREDENTIALS,
    "InvalidAuthenticationToken": _CREDENTIALS,
    "InvalidAuthenticationTokenTenant": _CREDENTIALS,
    "ExpiredAuthenticationToken": _CREDENTIALS,
    "DisabledSubscription": _CREDENTIALS,
    "ReadOnlyDisabledSubscription": _CREDENTIALS,
    "SubscriptionNotFound": _INVALID,
    "ResourceGroupNotFound": _INVALID,
    "ResourceNotFound": _INVALID,
    "NotFound": _INVALID,
    "BadRequest": _INVALID,
    "InvalidParameter": _INVALID,
    "InvalidRequestContent": _INVALID,
    "InvalidResourceReference": _INVALID,
    "ImageNotFound": _INVALID,
    "PlatformImageNotFound": _INVALID,
    "GalleryImageNotFound": _INVALID,
    "RequestDisallowedByPolicy": _INVALID,
    "MissingSubscriptionRegistration": _INVALID,
    "AvailabilityZoneNotSupported": Meaning(Trouble.invalid, Scope.zone),
    "AzureSpotIsNotSupportedForThisVMSize": _NOT_SO,
    "AzureSpotFeatureNotEnabledForSubscription": _NOT_SO,
    "InternalServerError": _OUTAGE,
    "InternalExecutionError": _OUTAGE,
    "ServiceUnavailable": _OUTAGE,
    "ServerTimeout": _OUTAGE,
    "GatewayTimeout": _OUTAGE,
    "Conflict": _OUTAGE,
    "RetryableError": _OUTAGE,
}

STATUSES: dict[int, Meaning] = {
    400: _INVALID,
    401: _CREDENTIALS,
    403: _CREDENTIALS,
    404: _INVALID,
    429: _THROTTLED,
}

ADVICE: dict[Trouble, str] = {
    Trouble.capacity: "The group's other zones are tried meanwhile.",
    Trouble.quota: "Ask Microsoft for more quota (Quotas in the portal) or lower max_machines.",
    Trouble.throttled: "Fewer calls are made for a while.",
    Trouble.credentials: "Check tenant_id, client_id and client_secret, and the permissions in docs/clouds.md.",
    Trouble.invalid: "Change the group's settings; `valohai-dagster groups check` looks at each.",
    Trouble.outage: "Check endpoint_url and the network if it stays.",
}


def meaning_of(code: str, status: int | None = None, words: str = "") -> Meaning:
    """`OperationNotAllowed` is Azure's word for many things; with a quota in the sentence it is that."""
    if status == 429:  # some of its throttles answer OperationNotAllowed
        return _THROTTLED
    if code == "OperationNotAllowed":
        return _QUOTA if "quota" in words.lower() else _INVALID
    known = CODES.get(code)
    if known is not None:
        return known
    return STATUSES.get(status or 0, _OUTAGE)


def words_of(message: str) -> str:
    """One line, not too long."""
    text = " ".join(message.split()).rstrip(". ")
    return text if len(text) <= 400 else text[:400] + "..."
