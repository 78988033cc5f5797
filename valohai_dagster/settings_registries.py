"""`[registries.NAME]`: credentials of private image registries, one model per kind of login, chosen by `kind` (T-22, A-30).

Whatever the kind, workers get a name and a password or token in sealed grants only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import Field, SecretStr, Tag, model_validator

from valohai_dagster.settings_base import Section, by_kind

_SECRET = "Better from the environment: `VALOHAI_REGISTRIES__<NAME>__{}`."  # noqa: S105 - advice, not a secret


class AnyRegistrySettings(Section):
    """What all of them have."""

    match: str = Field(
        min_length=1,
        description="Images that they are for: `registry.example.com/team/*`. In the path `*` stands for any text, "
        "slashes too, in the host for text between two dots; a host that is nothing but `*` is any. An image without a registry is matched as `docker.io/library/NAME` or `docker.io/OWNER/NAME`, one without "
        "a tag with `:latest`, and always also without its tag. Of several entries that fit, the longest pattern counts.",
    )


class DockerRegistrySettings(AnyRegistrySettings):
    """A user name and a password or access token: Docker Hub, Artifactory, Harbor, GitLab and most others."""

    kind: Literal["docker"] = Field(default="docker", description="`docker`, also when not stated.")
    username: str = Field(description="As for `docker login`.")
    password: SecretStr = Field(description=_SECRET.format("PASSWORD"))


class EcrRegistrySettings(AnyRegistrySettings):
    """Amazon ECR by access keys; the control plane gets a token of 12 hours for each registry."""

    kind: Literal["aws-ecr"]
    access_key_id: str = Field(description="Of a user that may `ecr:GetAuthorizationToken`.")
    secret_access_key: SecretStr = Field(description=_SECRET.format("SECRET_ACCESS_KEY"))
    region: str | None = Field(
        default=None, description="Default: the region in the image's name, else that of boto3."
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of the ECR API other than that of AWS."
    )


class EcrRoleRegistrySettings(AnyRegistrySettings):
    """Amazon ECR by a role that the control plane assumes, or by whatever credentials it has itself."""

    kind: Literal["aws-ecr-role"]
    role_arn: str | None = Field(
        default=None,
        description="Role to assume. Default: none, the credentials that boto3 finds (environment, profile, container "
        "or instance role) are used themselves.",
    )
    role_external_id: str | None = Field(
        default=None, description="External id that the role's trust policy asks for."
    )
    profile: str | None = Field(
        default=None, description="Profile of the AWS configuration files to take credentials from."
    )
    region: str | None = Field(
        default=None, description="Default: the region in the image's name, else that of boto3."
    )
    endpoint_url: str | None = Field(
        default=None, description="Address of the ECR API other than that of AWS."
    )
    sts_endpoint_url: str | None = Field(
        default=None, description="Where the role is assumed. Default: AWS STS of the region."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EcrRoleRegistrySettings:
        if self.role_external_id is not None and self.role_arn is None:
            raise ValueError("role_external_id needs role_arn")
        return self


class GoogleRegistrySettings(AnyRegistrySettings):
    """Google Artifact Registry (and gcr.io); workers get an access token of about an hour."""

    kind: Literal["gcp-ar"]
    credentials_file: Path | None = Field(
        default=None,
        description="Key file of a service account (JSON). Default: Application Default Credentials.",
    )


class AzureRegistrySettings(AnyRegistrySettings):
    """Azure Container Registry; a Microsoft Entra token is exchanged for a registry token of about three hours."""

    kind: Literal["azure-acr"]
    tenant_id: str | None = Field(default=None, description="Directory of the service principal.")
    client_id: str | None = Field(
        default=None,
        description="Service principal with the role AcrPull. Default: DefaultAzureCredential (environment, managed or "
        "workload identity).",
    )
    client_secret: SecretStr | None = Field(
        default=None, description=_SECRET.format("CLIENT_SECRET")
    )
    authority_url: str | None = Field(
        default=None, description="Default: `https://login.microsoftonline.com`."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AzureRegistrySettings:
        stated = [self.tenant_id, self.client_id, self.client_secret]
        if any(value is not None for value in stated) and None in stated:
            raise ValueError(
                "tenant_id, client_id and client_secret belong together; state all or none"
            )
        return self


REGISTRY_KINDS: Mapping[str, type[AnyRegistrySettings]] = {
    "docker": DockerRegistrySettings,
    "aws-ecr": EcrRegistrySettings,
    "aws-ecr-role": EcrRoleRegistrySettings,
    "gcp-ar": GoogleRegistrySettings,
    "azure-acr": AzureRegistrySettings,
}


RegistrySettings = Annotated[
    Union[
        Annotated[DockerRegistrySettings, Tag("docker")],
        Annotated[EcrRegistrySettings, Tag("aws-ecr")],
        Annotated[EcrRoleRegistrySettings, Tag("aws-ecr-role")],
        Annotated[GoogleRegistrySettings, Tag("gcp-ar")],
        Annotated[AzureRegistrySettings, Tag("azure-acr")],
    ],
    by_kind("registry", REGISTRY_KINDS, default="docker"),
]
