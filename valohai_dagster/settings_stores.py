"""`[stores.NAME]`: one model per kind of store, chosen by `kind`.

Values that are secret are better set from the environment than written into the file:
`VALOHAI_STORES__<name>__SECRET_ACCESS_KEY` and so on, with the store's name in small letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, Tag, field_validator, model_validator

from valohai_dagster.settings_base import Section, by_kind

MIB = 1024 * 1024
_PARTS = "Larger files are uploaded in parts of at least this many bytes, each sent and repeated on its own."
_SECRET = "Better from the environment: `VALOHAI_STORES__<NAME>__{}`."  # noqa: S105 - advice, not a secret


class LocalStoreSettings(Section):
    """A directory that control plane and workers share: this host's disk, or a network mount."""

    kind: Literal["local"] = Field(default="local", description="`local`, also when not stated.")
    path: Path = Field(description="The directory; made when missing.")
    readonly: bool = Field(default=False, description="Never write to it; inputs only.")


class RemoteStoreSettings(Section):
    """What all stores behind a network have."""

    readonly: bool = Field(default=False, description="Never write to it; inputs only.")
    connect_timeout_seconds: float = Field(
        default=10.0, gt=0, description="Longest wait for a connection, of the control plane."
    )
    read_timeout_seconds: float = Field(
        default=60.0, gt=0, description="Longest silence of the server in mid-answer, likewise."
    )

    @field_validator(
        "endpoint_url",
        "sts_endpoint_url",
        "auth_url",
        "storage_url",
        "base_url",
        check_fields=False,
    )
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("must be an address that starts with http:// or https://")
        if parts.username or parts.password:
            raise ValueError("must not hold credentials; there are settings for them")
        return value.rstrip("/")

    @field_validator("bucket", "container", "segment_container", check_fields=False)
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or "/" in value):
            raise ValueError("must be a name without slashes; a directory in it is part of the key")
        return value


class S3StoreSettings(RemoteStoreSettings):
    """An S3 bucket, of AWS or of any server that speaks S3."""

    kind: Literal["s3"] = Field(description="`s3`.")
    bucket: str = Field(description="Name of the bucket; it must exist.")
    region: str | None = Field(
        default=None,
        description="Region of the bucket. Default: that of the environment or AWS profile, else us-east-1.",
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of a server other than AWS. Workers must reach it too."
    )
    path_style: bool | None = Field(
        default=None,
        description="Bucket in the path instead of the host name. Default: yes with `endpoint_url` "
        "or a bucket with dots in its name, else no.",
    )
    profile: str | None = Field(
        default=None, description="Profile of the AWS configuration files to take credentials from."
    )
    access_key_id: str | None = Field(
        default=None,
        description="Default: the chain of boto3 (environment, profile, container or instance role).",
    )
    secret_access_key: SecretStr | None = Field(
        default=None, description=_SECRET.format("SECRET_ACCESS_KEY")
    )
    session_token: SecretStr | None = Field(
        default=None, description=f"Of temporary credentials. {_SECRET.format('SESSION_TOKEN')}"
    )
    role_arn: str | None = Field(
        default=None,
        description="Role to assume with these credentials. The temporary credentials are limited to "
        "this bucket by a session policy, whatever else the role may do.",
    )
    role_external_id: str | None = Field(
        default=None, description="External id that the role's trust policy asks for."
    )
    role_seconds: int = Field(
        default=3600,
        ge=900,
        le=43200,
        description="Life of the assumed credentials; a signed URL ends with the credentials that signed it.",
    )
    sts_endpoint_url: str | None = Field(
        default=None, description="Where roles are assumed. Default: AWS STS of the region."
    )
    encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = Field(
        default=None,
        description="Encryption at rest that every upload asks for by signed headers. Default: `aws:kms` with "
        "`kms_key_id`, else what the bucket says.",
    )
    kms_key_id: str | None = Field(
        default=None, description="Key (ARN or id) that objects are encrypted with (E-48)."
    )
    conditional_writes: bool = Field(
        default=True,
        description="Have the server refuse to overwrite (`If-None-Match`). Turn off for servers without it; the "
        "control plane then looks before it writes, and keys of outputs are random anyway.",
    )
    part_bytes: int = Field(default=16 * MIB, ge=5 * MIB, le=5120 * MIB, description=_PARTS)

    @model_validator(mode="after")
    def _consistent(self) -> S3StoreSettings:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError(
                "access_key_id and secret_access_key belong together; state both or none"
            )
        if self.session_token is not None and self.access_key_id is None:
            raise ValueError("session_token needs access_key_id and secret_access_key")
        if self.profile is not None and self.access_key_id is not None:
            raise ValueError("state a profile or access_key_id, not both")
        if self.role_external_id is not None and self.role_arn is None:
            raise ValueError("role_external_id needs role_arn")
        if self.kms_key_id is not None and self.encryption == "AES256":
            raise ValueError('kms_key_id needs encryption = "aws:kms" (or none stated)')
        return self


class GcsStoreSettings(RemoteStoreSettings):
    """A Google Cloud Storage bucket."""

    kind: Literal["gcs"] = Field(description="`gcs`.")
    bucket: str = Field(description="Name of the bucket; it must exist.")
    credentials_file: Path | None = Field(
        default=None,
        description="Key file of a service account (JSON). Default: Application Default Credentials.",
    )
    project: str | None = Field(
        default=None, description="Project that requests are billed to, if the bucket asks for it."
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of an emulator, or of a private endpoint."
    )
    anonymous: bool = Field(
        default=False,
        description="Use no credentials: public buckets (readonly) and emulators; URLs are not signed.",
    )
    part_bytes: int = Field(
        default=16 * MIB,
        ge=256 * 1024,
        multiple_of=256 * 1024,
        description="Larger files are uploaded in chunks of this many bytes, a multiple of 256 KiB.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> GcsStoreSettings:
        if self.anonymous and self.credentials_file is not None:
            raise ValueError("state a credentials_file or anonymous = true, not both")
        return self


class AzureStoreSettings(RemoteStoreSettings):
    """An Azure Blob Storage container."""

    kind: Literal["azure"] = Field(description="`azure`.")
    account: str | None = Field(
        default=None, description="Storage account. Needed unless there is a connection string."
    )
    container: str = Field(description="Name of the container; it must exist.")
    account_key: SecretStr | None = Field(
        default=None, description=f"Key of the account. {_SECRET.format('ACCOUNT_KEY')}"
    )
    connection_string: SecretStr | None = Field(
        default=None, description=f"Instead of the others. {_SECRET.format('CONNECTION_STRING')}"
    )
    sas_token: SecretStr | None = Field(
        default=None,
        description="A shared access signature of the container, handed to workers as it is: prefer the others, which "
        f"sign for one blob at a time. {_SECRET.format('SAS_TOKEN')}",
    )
    endpoint_url: str | None = Field(
        default=None, description="Default: `https://<account>.blob.core.windows.net`."
    )
    part_bytes: int = Field(default=16 * MIB, ge=64 * 1024, le=4000 * MIB, description=_PARTS)

    @model_validator(mode="after")
    def _consistent(self) -> AzureStoreSettings:
        ways = ("account_key", "connection_string", "sas_token")
        stated = [way for way in ways if getattr(self, way) is not None]
        if len(stated) > 1:
            raise ValueError(f"state one of {', '.join(ways)} (none: DefaultAzureCredential)")
        if self.account is None and self.connection_string is None:
            raise ValueError("account is missing (or a connection_string)")
        return self


class SwiftStoreSettings(RemoteStoreSettings):
    """An OpenStack Swift container; uploads and downloads of workers go by temporary URLs."""

    kind: Literal["swift"] = Field(description="`swift`.")
    container: str = Field(description="Name of the container; it must exist.")
    auth_url: str = Field(description="Where tokens are got: `https://keystone.example.com/v3`.")
    auth_version: Literal["1", "3"] = Field(
        default="3", description="`3` is Keystone; `1` is TempAuth and RADOS Gateway."
    )
    user: str | None = Field(default=None, description="User name; `account:user` with version 1.")
    key: SecretStr | None = Field(default=None, description=f"Password. {_SECRET.format('KEY')}")
    application_credential_id: str | None = Field(
        default=None, description="Instead of user and key (version 3)."
    )
    application_credential_secret: SecretStr | None = Field(
        default=None, description=_SECRET.format("APPLICATION_CREDENTIAL_SECRET")
    )
    project: str | None = Field(
        default=None,
        description="Project name to work in; also the first part of `swift://PROJECT/CONTAINER/KEY`.",
    )
    project_id: str | None = Field(default=None, description="Instead of the name (version 3).")
    user_domain: str = Field(default="Default", description="Domain of the user (version 3).")
    project_domain: str = Field(default="Default", description="Domain of the project (version 3).")
    region: str | None = Field(
        default=None, description="Region, if the service catalogue holds several."
    )
    storage_url: str | None = Field(
        default=None,
        description="Address of the account, if workers reach it otherwise than the catalogue says.",
    )
    temp_url_key: SecretStr | None = Field(
        default=None,
        description="Key of the account or container that signs temporary URLs. Default: the one that is set there. "
        + _SECRET.format("TEMP_URL_KEY"),
    )
    segment_container: str | None = Field(
        default=None,
        description="Where segments of large objects lie; made when missing. Default: `<container>_segments`.",
    )
    part_bytes: int = Field(default=64 * MIB, ge=1024 * 1024, le=5120 * MIB, description=_PARTS)

    @field_validator("auth_version", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value).removesuffix(".0") if isinstance(value, (int, float, str)) else value

    @model_validator(mode="after")
    def _consistent(self) -> SwiftStoreSettings:
        password = self.user is not None and self.key is not None
        application = (
            self.application_credential_id is not None
            and self.application_credential_secret is not None
        )
        if self.auth_version == "1" and not password:
            raise ValueError("auth_version 1 needs user and key")
        if password == application:
            raise ValueError(
                "state user and key, or application_credential_id and application_credential_secret"
            )
        return self


class HttpStoreSettings(RemoteStoreSettings):
    """Files below one HTTP address; for reading only."""

    kind: Literal["http"] = Field(description="`http`.")
    base_url: str = Field(description="Address that keys are appended to.")
    username: str | None = Field(default=None, description="For basic authentication.")
    password: SecretStr | None = Field(default=None, description=_SECRET.format("PASSWORD"))
    headers: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="Sent with every request, such as `Authorization`. They reach workers in sealed grants only.",
    )
    readonly: bool = Field(default=True, description="Always so.")

    @model_validator(mode="after")
    def _consistent(self) -> HttpStoreSettings:
        if not self.readonly:
            raise ValueError("nothing can be written by plain HTTP; leave readonly out")
        if self.password is not None and self.username is None:
            raise ValueError("password needs username")
        if urlsplit(self.base_url).query or urlsplit(self.base_url).fragment:
            raise ValueError("base_url must not have a query or fragment")
        return self


STORE_KINDS: Mapping[str, type[Section]] = {
    "local": LocalStoreSettings,
    "s3": S3StoreSettings,
    "gcs": GcsStoreSettings,
    "azure": AzureStoreSettings,
    "swift": SwiftStoreSettings,
    "http": HttpStoreSettings,
}


StoreSettings = Annotated[
    Union[
        Annotated[LocalStoreSettings, Tag("local")],
        Annotated[S3StoreSettings, Tag("s3")],
        Annotated[GcsStoreSettings, Tag("gcs")],
        Annotated[AzureStoreSettings, Tag("azure")],
        Annotated[SwiftStoreSettings, Tag("swift")],
        Annotated[HttpStoreSettings, Tag("http")],
    ],
    by_kind("store", STORE_KINDS, default="local"),
]
