"""What the errors of S3 mean for a store, and what to do about each."""

from __future__ import annotations

import re
from typing import NamedTuple

from botocore.exceptions import ClientError

from valohai_dagster.errors import (
    StoreConflict,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreNotWritable,
    StoreUnavailable,
)

_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,80})</Code>")


class Meaning(NamedTuple):
    """Classes for reading and writing, and the next step; `{section}` and `{bucket}` are filled in."""

    reading: type[StoreError]
    writing: type[StoreError]
    advice: str


def _both(kind: type[StoreError], advice: str) -> Meaning:
    return Meaning(kind, kind, advice)


_NO_BUCKET = _both(
    StoreUnavailable, "there is no bucket {bucket!r}: make it, or correct `bucket` in {section}"
)
_DENIED = Meaning(
    StoreUnavailable,
    StoreNotWritable,
    "these credentials may not do that; docs/stores.md lists the permissions a store needs "
    "(without s3:ListBucket a missing object looks like this too)",
)
_WRONG_KEYS = Meaning(
    StoreUnavailable,
    StoreNotWritable,
    "access_key_id or secret_access_key of {section} is wrong, or meant for another server",
)
_RAN_OUT = _both(
    StoreUnavailable,
    "the credentials have run out: give fresh ones (session_token in {section}, or log in again)",
)
_NO_KEYS = _both(
    StoreUnavailable,
    "set access_key_id and secret_access_key in {section}, or a profile or role that boto3 finds",
)
_CLOCK = _both(StoreUnavailable, "the clock of this machine is wrong: switch on NTP")
_REGION = _both(
    StoreUnavailable, "the bucket lies in another region: correct `region` in {section}"
)
_FULL = _both(StoreFull, "free space, raise its quota, or choose another store")
_AWAY = _both(StoreUnavailable, "check endpoint_url in {section} and the network, then try again")
_CONFLICT = _both(StoreConflict, "stores never overwrite")
_MISSING = _both(StoreMissing, "it was deleted, or never written")
_KMS = Meaning(
    StoreUnavailable,
    StoreNotWritable,
    "check kms_key_id in {section} and that these credentials may use the key",
)
_UNKNOWN_CONDITION = _both(
    StoreError,
    "this server does not know If-None-Match: set conditional_writes = false in {section}",
)

_MEANINGS: dict[str, Meaning] = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _NO_BUCKET,
    "ParamValidationError": _NO_BUCKET,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "Forbidden": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": _WRONG_KEYS,
    "SignatureDoesNotMatch": _WRONG_KEYS,
    "AuthorizationQueryParametersError": _WRONG_KEYS,
    "InvalidToken": _WRONG_KEYS,
    "ExpiredToken": _RAN_OUT,
    "RequestExpired": _RAN_OUT,
    "TokenRefreshRequired": _RAN_OUT,
    "UnauthorizedSSOTokenError": _RAN_OUT,
    "SSOTokenLoadError": _RAN_OUT,
    "TokenRetrievalError": _RAN_OUT,
    "NoCredentialsError": _NO_KEYS,
    "PartialCredentialsError": _NO_KEYS,
    "CredentialRetrievalError": _NO_KEYS,
    "MetadataRetrievalError": _NO_KEYS,
    "ProfileNotFound": _both(
        StoreUnavailable, "there is no such profile: correct `profile` in {section}"
    ),
    "RequestTimeTooSkewed": _CLOCK,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
    "QuotaExceeded": _FULL,
    "InsufficientStorage": _FULL,
    "XMinioStorageFull": _FULL,
    "EntityTooLarge": _FULL,
    "PreconditionFailed": _CONFLICT,
    "412": _CONFLICT,
    "NoSuchKey": _MISSING,
    "NoSuchUpload": _MISSING,
    "InvalidObjectState": _both(
        StoreUnavailable,
        "the object is in an archive class: restore it first (aws s3api restore-object)",
    ),
    "NotImplemented": _UNKNOWN_CONDITION,
    "EndpointConnectionError": _AWAY,
    "ConnectTimeoutError": _AWAY,
    "ReadTimeoutError": _AWAY,
    "ConnectionClosedError": _AWAY,
    "SSLError": _both(
        StoreUnavailable,
        "the server's certificate is not trusted here: name its authority in AWS_CA_BUNDLE",
    ),
}


def meaning_of(code: str) -> Meaning | None:
    """None for codes that say no more than their HTTP status."""
    word = code.partition(" ")[0]
    return _KMS if word.startswith("KMS.") else _MEANINGS.get(word)


def code_of(error: Exception) -> str:
    """The service's word, with the region that it names: `PermanentRedirect (eu-west-1)`."""
    if not isinstance(error, ClientError):
        return type(error).__name__
    details = error.response.get("Error", {})
    code = str(details.get("Code", ""))
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = details.get("Region") or headers.get("x-amz-bucket-region")
    return f"{code} (its region is {region})" if region and meaning_of(code) is _REGION else code


def code_in(body: str) -> str:
    """The code in the XML of a refused request; empty without one. The rest may show the request's signature."""
    found = _CODE.search(body)
    return found[1] if found else ""
