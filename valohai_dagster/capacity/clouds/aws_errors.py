"""What the errors of EC2 and Auto Scaling mean for a group: the kind of trouble, and how far it reaches. Pure."""

from __future__ import annotations

import re
from enum import Enum
from textwrap import shorten
from typing import NamedTuple

from valohai_dagster.capacity.clouds.base import CloudError, Trouble
from valohai_dagster.capacity.model import Purchase

TEXT_CHARACTERS = 300


class Scope(Enum):
    """What else is refused for the same reason."""

    group = "group"
    zone = "zone"
    purchase = "purchase"
    pool = "pool"  # this purchase in this zone


class Meaning(NamedTuple):
    trouble: Trouble
    scope: Scope


def _all(trouble: Trouble, scope: Scope, codes: str) -> dict[str, Meaning]:
    return dict.fromkeys(codes.split(), Meaning(trouble, scope))


_MEANINGS: dict[str, Meaning] = {
    **_all(
        Trouble.capacity,
        Scope.pool,
        "InsufficientInstanceCapacity InsufficientCapacity InsufficientHostCapacity UnfulfillableCapacity "
        "InsufficientReservedInstanceCapacity SpotMaxPriceTooLow",
    ),
    **_all(
        Trouble.capacity,
        Scope.zone,
        "InsufficientFreeAddressesInSubnet InsufficientVolumeCapacity InsufficientAddressCapacity",
    ),
    # Ordinary machines and spot have quotas of their own.
    **_all(
        Trouble.quota,
        Scope.purchase,
        "VcpuLimitExceeded InstanceLimitExceeded MaxSpotInstanceCountExceeded SpotInstanceCountLimitExceeded",
    ),
    **_all(
        Trouble.quota,
        Scope.group,
        "LimitExceeded VolumeLimitExceeded MaxIOPSLimitExceeded NetworkInterfaceLimitExceeded "
        "AddressLimitExceeded PrivateIpAddressLimitExceeded ResourceLimitExceeded PendingVerification",
    ),
    **_all(
        Trouble.throttled,
        Scope.group,
        "RequestLimitExceeded Throttling ThrottlingException ThrottledException RequestThrottled "
        "RequestThrottledException EC2ThrottledException TooManyRequestsException SlowDown BandwidthLimitExceeded "
        "PriorRequestNotComplete ResourceContention ResourceInUse ScalingActivityInProgress "
        "ConcurrentTagAccess IncorrectInstanceState IncorrectState",
    ),
    **_all(
        Trouble.credentials,
        Scope.group,
        "AuthFailure UnauthorizedOperation AccessDenied AccessDeniedException InvalidClientTokenId "
        "InvalidAccessKeyId InvalidToken SignatureDoesNotMatch UnrecognizedClientException ExpiredToken "
        "ExpiredTokenException RequestExpired MissingAuthenticationToken IncompleteSignature OptInRequired Blocked "
        "ServiceLinkedRoleFailure NoCredentialsError PartialCredentialsError CredentialRetrievalError "
        "MetadataRetrievalError ProfileNotFound TokenRetrievalError SSOTokenLoadError UnauthorizedSSOTokenError "
        "InvalidConfigError RefreshWithMFAUnsupportedError",
    ),
    # A call that is still being worked on is like one without an answer: it may have its effect.
    **_all(
        Trouble.outage,
        Scope.group,
        "IdempotentCallInProgress "
        "InternalError InternalFailure InternalServerError ServerInternal ServiceUnavailable Unavailable "
        "ServiceUnavailableException RequestTimeout EndpointConnectionError ConnectTimeoutError ReadTimeoutError "
        "ConnectionClosedError ConnectionError ProxyConnectionError HTTPClientError SSLError ResponseParserError",
    ),
    # A type that one zone does not have, others may.
    "Unsupported": Meaning(Trouble.invalid, Scope.zone),
}

# By the beginning of the code, where a family has many members.
_FAMILIES = {
    "AuthFailure.": Meaning(Trouble.credentials, Scope.group),
    "Server.": Meaning(Trouble.outage, Scope.group),
    "Throttl": Meaning(Trouble.throttled, Scope.group),
}

_ADVICE = {
    Trouble.capacity: "other zones, `instance_types` or `on_demand_fallback` in {section} give it more to choose from",
    Trouble.quota: "ask AWS for a higher quota (Service Quotas, Amazon EC2), or lower `max_machines` in {section}",
    Trouble.throttled: "fewer calls are made for a while",
    Trouble.credentials: "check `profile`, `scaling_role_arn` and the credentials of this process; docs/clouds.md lists "
    "the permissions that a group needs",
    Trouble.invalid: "correct {section}",
    Trouble.outage: "check `region` and `endpoint_url` in {section} and the network",
}

# Long, of no use without a further permission, and different each time.
_ENCODED = re.compile(r"\s*Encoded authorization failure message: \S+")
# botocore repeats what it was given; user data is a secret for a while.
_VALUE = re.compile(r"value: .*?(?=, (?:type|valid)|$)", re.DOTALL)


def meaning_of(code: str, status: int = 0) -> Meaning:
    """Of an error code, or of the name of an exception; `status` (HTTP) decides about unknown ones."""
    known = _MEANINGS.get(code)
    if known is not None:
        return known
    for start, meaning in _FAMILIES.items():
        if code.startswith(start):
            return meaning
    if status >= 500:
        return Meaning(Trouble.outage, Scope.group)
    if status == 429:
        return Meaning(Trouble.throttled, Scope.group)
    if status in (401, 403):
        return Meaning(Trouble.credentials, Scope.group)
    return Meaning(Trouble.invalid, Scope.group)


def cloud_error(
    group: str,
    doing: str,
    *,
    code: str,
    text: str = "",
    status: int = 0,
    zone: str | None = None,
    purchase: Purchase | None = None,
    answered: bool = True,
) -> CloudError:
    """In words; `zone` and `purchase` are those that were tried. `answered`: it was AWS that said it."""
    trouble, scope = meaning_of(code, status)
    said = _VALUE.sub("value: …", _ENCODED.sub("", " ".join(text.split())))
    said = shorten(said, TEXT_CHARACTERS, placeholder=" ...")
    where = f" in {zone}" if zone else ""
    how = " as spot" if purchase is Purchase.spot else ""
    advice = _ADVICE[trouble].format(section=f"[groups.{group}]")
    said_no = "AWS refused" if answered else "AWS could not be asked"
    words = f"{said.rstrip('. ')} ({code})" if said else code
    return CloudError(
        f"group {group}: {said_no} to {doing}{how}{where}: {words}; {advice}",
        code=code,
        trouble=trouble,
        zone=zone if scope in (Scope.zone, Scope.pool) else None,
        purchase=purchase if scope in (Scope.purchase, Scope.pool) else None,
    )


def of_exception(
    error: Exception,
    group: str,
    doing: str,
    *,
    zone: str | None = None,
    purchase: Purchase | None = None,
) -> CloudError:
    """Of what botocore raises."""
    answer = getattr(error, "response", None) or {}
    details = answer.get("Error", {})
    return cloud_error(
        group,
        doing,
        code=str(details.get("Code") or type(error).__name__),
        text=str(details.get("Message") or ("" if details else error)),
        status=int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
        zone=zone,
        purchase=purchase,
        answered=bool(answer),
    )
