"""How one S3 bucket is reached: credentials, the role to assume, the client, and what signs URLs.

Nothing is contacted before it is needed, and signing contacts nobody unless credentials must be got first.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs, urlsplit

import botocore.config
import botocore.credentials
import botocore.exceptions
import botocore.session

from valohai_dagster.errors import StoreUnavailable
from valohai_dagster.settings_stores import S3StoreSettings
from valohai_dagster.stores.sigv4 import Signer

DEFAULT_REGION = "us-east-1"
CONNECTIONS = 32  # of one store, at the same time
ROLE_REFRESH_SECONDS = 300  # at least so much life is left in what signs
_PROBE = "probe"
_READ = ("s3:GetObject",)
_WRITE = (
    "s3:PutObject",
    "s3:DeleteObject",
    "s3:AbortMultipartUpload",
    "s3:ListMultipartUploadParts",
)
_BUCKET = (
    "s3:ListBucket",
    "s3:ListBucketVersions",
    "s3:ListBucketMultipartUploads",
    "s3:GetBucketLocation",
)


@dataclass(frozen=True, kw_only=True)
class Signing:
    """What signs now, and until when its credentials live (None: as long as anybody knows)."""

    signer: Signer
    ends: datetime | None


class S3Access:
    """Thread-safe. `region_found` takes what the bucket itself says, for stores that state no region."""

    def __init__(self, name: str, section: S3StoreSettings) -> None:
        self._name, self._section = name, section
        self._lock = threading.RLock()
        self._region: str | None = None
        self._place: tuple[str, str, str] | None = None
        self._made: Any = None

    @property
    def region(self) -> str:
        with self._lock:
            return self._region or self._section.region or self._configured_region or DEFAULT_REGION

    @property
    def states_region(self) -> bool:
        return self._section.region is not None

    def region_found(self, region: str) -> None:
        with self._lock:
            self._region, self._place, self._made = region, None, None

    @property
    def client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._credentials()  # first, so that a missing profile is told as such
                section = self._section
                self._made = self._session.create_client(
                    "s3",
                    region_name=self.region,
                    endpoint_url=section.endpoint_url,
                    config=self._config,
                )
            return self._made

    def signing(self) -> Signing:
        """Credentials that are refreshed before they run out, bound to the bucket's address."""
        credentials = self._credentials()
        frozen = credentials.get_frozen_credentials()
        with self._lock:
            if self._place is None:
                self._place = self._find_place()
            base, region, service = self._place
        signer = Signer(
            base=base,
            region=region,
            service=service,
            access_key=frozen.access_key,
            secret_key=frozen.secret_key,
            token=frozen.token,
        )
        # botocore keeps it to itself; without it a URL would promise more than its credentials can.
        return Signing(signer=signer, ends=getattr(credentials, "_expiry_time", None))

    def _find_place(self) -> tuple[str, str, str]:
        """The bucket's address, region and service as botocore has them: it knows endpoints, partitions and styles."""
        url = self.client.generate_presigned_url(
            "get_object", Params={"Bucket": self._section.bucket, "Key": _PROBE}, ExpiresIn=60
        )
        parts = urlsplit(url)
        scope = parse_qs(parts.query)["X-Amz-Credential"][0].rsplit("/", 4)
        path = parts.path.removesuffix(f"/{_PROBE}")
        return f"{parts.scheme}://{parts.netloc}{path}", scope[2], scope[3]

    @cached_property
    def _session(self) -> botocore.session.Session:
        section = self._section
        session = botocore.session.Session(profile=section.profile)
        if section.access_key_id is not None and section.secret_access_key is not None:
            token = section.session_token
            session.set_credentials(
                section.access_key_id,
                section.secret_access_key.get_secret_value(),
                token.get_secret_value() if token is not None else None,
            )
        return session

    @cached_property
    def _configured_region(self) -> str | None:
        return self._session.get_config_variable("region")

    @property
    def _config(self) -> botocore.config.Config:
        section = self._section
        path_style = section.path_style
        if path_style is None:
            # Certificates of AWS cover no bucket with dots in its host name.
            path_style = section.endpoint_url is not None or "." in section.bucket
        # Checksums of botocore's own are left out: many servers that speak S3 do not know them.
        return botocore.config.Config(
            signature_version="s3v4",
            connect_timeout=section.connect_timeout_seconds,
            read_timeout=section.read_timeout_seconds,
            max_pool_connections=CONNECTIONS,
            retries={"mode": "standard", "max_attempts": 4},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={
                # Not `auto`: URLs would name the global address, which cannot find buckets of new regions.
                "addressing_style": "path" if path_style else "virtual",
                "us_east_1_regional_endpoint": "regional",
            },
        )

    # -- credentials --------------------------------------------------------------------------------------------

    def _credentials(self) -> Any:
        with self._lock:
            found = self._session.get_credentials()
            if found is None:
                raise botocore.exceptions.NoCredentialsError()
            if self._section.role_arn is not None and not isinstance(found, _RoleCredentials):
                found = self._assume_role(found)
                self._session._credentials = found  # botocore has no other way to set such
            return found

    def _assume_role(self, source: Any) -> _RoleCredentials:
        session = botocore.session.Session(profile=self._section.profile)
        session._credentials = source  # as above
        sts = session.create_client(
            "sts",
            region_name=self.region,
            endpoint_url=self._section.sts_endpoint_url,
            config=botocore.config.Config(
                connect_timeout=self._section.connect_timeout_seconds,
                read_timeout=self._section.read_timeout_seconds,
            ),
        )

        def refresh() -> dict[str, str]:
            return self._ask_for_role(sts)

        return _RoleCredentials.create_from_metadata(
            refresh(),
            refresh_using=refresh,
            method="assume-role",
            advisory_timeout=max(ROLE_REFRESH_SECONDS, self._section.role_seconds // 4),
            mandatory_timeout=ROLE_REFRESH_SECONDS,
        )

    def _ask_for_role(self, sts: Any) -> dict[str, str]:
        section = self._section
        external = {"ExternalId": section.role_external_id} if section.role_external_id else {}
        try:
            answer = sts.assume_role(
                RoleArn=section.role_arn,
                RoleSessionName=re.sub(r"[^\w+=,.@-]", "-", f"valohai-{self._name}")[:64],
                DurationSeconds=section.role_seconds,
                Policy=session_policy(section),
                **external,
            )["Credentials"]
        except botocore.exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            raise StoreUnavailable(
                f"the store {self._name!r} cannot assume the role {section.role_arn}: {code}; check that the role's "
                f"trust policy names these credentials (and role_external_id), and role_arn and role_seconds in "
                f"[stores.{self._name}]",
                store=self._name,
            ) from error
        return {
            "access_key": answer["AccessKeyId"],
            "secret_key": answer["SecretAccessKey"],
            "token": answer["SessionToken"],
            "expiry_time": answer["Expiration"].astimezone(timezone.utc).isoformat(),
        }


class _RoleCredentials(botocore.credentials.RefreshableCredentials):
    """Of the role that the settings name; its own kind, to tell them from those that assumed it."""


def session_policy(section: S3StoreSettings) -> str:
    """Limits a role to what a store does with its one bucket, uploads in parts included (E-43), as compact JSON."""
    partition = (section.role_arn or "arn:aws").split(":")[1] or "aws"
    bucket = f"arn:{partition}:s3:::{section.bucket}"
    actions = _READ if section.readonly else (*_READ, *_WRITE)
    statements: list[dict[str, Any]] = [
        {"Effect": "Allow", "Action": list(actions), "Resource": f"{bucket}/*"},
        {"Effect": "Allow", "Action": list(_BUCKET), "Resource": bucket},
    ]
    if section.endpoint_url is None:
        key = section.kms_key_id or ""
        statements.append(
            {
                "Effect": "Allow",
                "Action": ["kms:Decrypt", "kms:GenerateDataKey"],
                "Resource": key if key.startswith("arn:") else "*",
                "Condition": {"StringLike": {"kms:ViaService": "s3.*.amazonaws.com*"}},
            }
        )
    policy = {"Version": "2012-10-17", "Statement": statements}
    return json.dumps(policy, separators=(",", ":"))
