"""Presigned URLs of S3 (AWS Signature Version 4 in the query), for signing thousands of them at once.

Pure computing. What botocore's signer does for any request costs ten times as much; the tests hold both against each
other. Nothing here may be logged: a signed URL is a credential.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from urllib.parse import quote, urlsplit

ALGORITHM = "AWS4-HMAC-SHA256"
_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Signs for one bucket with one set of credentials. `base` is the bucket's address without a slash at the end."""

    base: str
    region: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    service: str = "s3"

    def url(
        self,
        method: str,
        key: str,
        *,
        now: datetime,
        seconds: int,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """A URL for that request until `now` (UTC) + `seconds`; whoever uses it must send just these headers."""
        origin, root, host = _split(self.base)
        day, moment = _stamps(now.replace(microsecond=0))
        scope = f"{day}/{self.region}/{self.service}/aws4_request"
        sent = {name.lower(): " ".join(value.split()) for name, value in (headers or {}).items()}
        sent["host"] = host
        names = sorted(sent)
        signed = ";".join(names)
        parameters = {
            **(query or {}),
            "X-Amz-Algorithm": ALGORITHM,
            "X-Amz-Credential": f"{self.access_key}/{scope}",
            "X-Amz-Date": moment,
            "X-Amz-Expires": str(seconds),
            "X-Amz-SignedHeaders": signed,
        }
        if self.token is not None:
            parameters["X-Amz-Security-Token"] = self.token
        encoded = "&".join(
            f"{quote(name, safe='~')}={_quoted(parameters[name])}" for name in sorted(parameters)
        )
        path = f"{root}/{quote(key, safe='/~')}"
        lines = "".join(f"{name}:{sent[name]}\n" for name in names)
        request = f"{method}\n{path}\n{encoded}\n{lines}\n{signed}\nUNSIGNED-PAYLOAD"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"{ALGORITHM}\n{moment}\n{scope}\n{digest}"
        secret = _signing_key(self.secret_key, day, self.region, self.service)
        signature = hmac.digest(secret, text.encode(), "sha256").hex()
        return f"{origin}{path}?{encoded}&X-Amz-Signature={signature}"


@lru_cache(maxsize=64)
def _split(base: str) -> tuple[str, str, str]:
    """Origin, path and Host header of an address, the header as clients send it."""
    parts = urlsplit(base)
    host = parts.netloc.removesuffix(_PORTS.get(parts.scheme, "-"))
    return f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/"), host


@lru_cache(maxsize=4)
def _stamps(now: datetime) -> tuple[str, str]:
    return now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")


@lru_cache(maxsize=256)
def _quoted(value: str) -> str:
    return quote(value, safe="~")


@lru_cache(maxsize=64)
def _signing_key(secret: str, day: str, region: str, service: str) -> bytes:
    key = b"AWS4" + secret.encode()
    for step in (day, region, service, "aws4_request"):
        key = hmac.digest(key, step.encode(), "sha256")
    return key
