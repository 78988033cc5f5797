"""Tokens of Amazon ECR."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from valohai_dagster.executions.registries.tokens import MintFailure, Token, require_own_host
from valohai_dagster.settings_registries import EcrRegistrySettings, EcrRoleRegistrySettings

_HOST = re.compile(
    r"(\d{12})\.dkr[.-]ecr(?:-fips)?\.([a-z0-9-]+)\.(?:amazonaws\.com(?:\.cn)?|on\.aws)"
)
ROLE_SECONDS = 900  # the credentials serve for one call


def mint(
    settings: EcrRegistrySettings | EcrRoleRegistrySettings, registry: str, now: datetime
) -> Token:
    """A token for the registry's account. Raises `MintFailure`."""
    require_own_host(registry, _HOST, match=settings.match, whose="Amazon ECR")
    named = _HOST.fullmatch(registry)
    region = settings.region or (named.group(2) if named else None)
    with _explained(settings):
        client = _session(settings, region).client(
            "ecr", endpoint_url=settings.endpoint_url, config=_config()
        )
        accounts = {"registryIds": [named.group(1)]} if named else {}
        (data,) = client.get_authorization_token(**accounts)["authorizationData"][:1]
    username, _, password = base64.b64decode(data["authorizationToken"]).decode().partition(":")
    return Token(
        username=username,
        password=password,
        minted_at=now,
        expires_at=data["expiresAt"].astimezone(timezone.utc),
    )


def _session(settings: EcrRegistrySettings | EcrRoleRegistrySettings, region: str | None) -> Any:
    import boto3

    if isinstance(settings, EcrRegistrySettings):
        return boto3.Session(
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=settings.secret_access_key.get_secret_value(),
            region_name=region,
        )
    own = boto3.Session(profile_name=settings.profile, region_name=region)
    if settings.role_arn is None:
        return own
    sts = own.client("sts", endpoint_url=settings.sts_endpoint_url, config=_config())
    wanted = {"ExternalId": settings.role_external_id} if settings.role_external_id else {}
    role = sts.assume_role(
        RoleArn=settings.role_arn,
        RoleSessionName="valohai-dagster-registry",
        DurationSeconds=ROLE_SECONDS,
        **wanted,
    )["Credentials"]
    return boto3.Session(
        aws_access_key_id=role["AccessKeyId"],
        aws_secret_access_key=role["SecretAccessKey"],
        aws_session_token=role["SessionToken"],
        region_name=region,
    )


def _config() -> Any:
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 4}
    return Config(connect_timeout=10, read_timeout=30, retries=retries)


@contextmanager
def _explained(settings: EcrRegistrySettings | EcrRoleRegistrySettings) -> Iterator[None]:
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise MintFailure(
            "boto3 is not installed", "install the extra: pip install 'valohai-dagster[aws]'"
        ) from error
    try:
        yield
    except ClientError as error:
        answer = error.response.get("Error", {})
        raise MintFailure(
            f"AWS refuses {error.operation_name}: {answer.get('Code')}: {answer.get('Message')}",
            _advice(settings),
        ) from error
    except (BotoCoreError, ValueError) as error:
        raise MintFailure(f"AWS cannot be asked: {error}", _advice(settings)) from error


def _advice(settings: EcrRegistrySettings | EcrRoleRegistrySettings) -> str:
    if isinstance(settings, EcrRegistrySettings):
        who = "access_key_id and secret_access_key, and that their user"
    elif settings.role_arn is not None:
        who = "role_arn and its trust policy, and that the role"
    else:
        who = "the control plane's own AWS credentials, and that they"
    return f"check {who} may ecr:GetAuthorizationToken and read the repository"
