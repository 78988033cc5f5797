"""How AWS is reached for one group: credentials, the role to assume (E-47), a client for each service."""

from __future__ import annotations

import re
from functools import cache, cached_property, partial
from typing import Any

import botocore.config
import botocore.credentials
import botocore.exceptions
import botocore.loaders
import botocore.session

from valohai_dagster.capacity.clouds.aws_errors import cloud_error
from valohai_dagster.settings_groups import AwsGroupSettings
from valohai_dagster.version import __version__

CONNECT_SECONDS = 5
READ_SECONDS = 60  # LaunchInstances answers when EC2 has tried
ATTEMPTS = 2  # of one call; who called comes again anyway


@cache
def _descriptions() -> botocore.loaders.Loader:
    """Of the services. That of EC2 alone takes tens of megabytes, and every group needs the same."""
    return botocore.session.Session().get_component("data_loader")


class AwsAccess:
    """Nothing is contacted before it is needed. For one thread at a time."""

    def __init__(self, group: str, settings: AwsGroupSettings) -> None:
        self._group, self._settings = group, settings
        self._clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = self._session.create_client(service, **self._options)
        return self._clients[service]

    @property
    def region(self) -> str:
        """Raises CloudError when nobody has said which."""
        found = self._settings.region or self._base_session.get_config_variable("region")
        if not found:
            raise cloud_error(
                self._group,
                "do anything",
                code="NoRegionError",
                text="no region is known; set `region`",
            )
        return found

    def close(self) -> None:
        """What is asked for after that is made anew: credentials may have been corrected meanwhile."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        for made in ("_base_session", "_session"):
            self.__dict__.pop(made, None)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "region_name": self.region,
            "endpoint_url": self._settings.endpoint_url,
            "config": botocore.config.Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                user_agent_extra=f"valohai-dagster/{__version__}",
            ),
        }

    @cached_property
    def _base_session(self) -> botocore.session.Session:
        return self._new_session()

    def _new_session(self) -> botocore.session.Session:
        session = botocore.session.Session(profile=self._settings.profile)
        session.register_component("data_loader", _descriptions())
        return session

    @cached_property
    def _session(self) -> botocore.session.Session:
        """The same with the role's credentials, which are renewed before they run out."""
        settings = self._settings
        if settings.scaling_role_arn is None:
            return self._base_session
        source = self._base_session.get_credentials()
        if source is None:
            raise botocore.exceptions.NoCredentialsError()
        fetcher = botocore.credentials.AssumeRoleCredentialFetcher(
            client_creator=partial(self._base_session.create_client, **self._options),
            source_credentials=source,
            role_arn=settings.scaling_role_arn,
            extra_args={
                "RoleSessionName": re.sub(r"[^\w+=,.@-]", "-", f"valohai-{self._group}")[:64],
                **({"ExternalId": settings.role_external_id} if settings.role_external_id else {}),
            },
        )
        session = self._new_session()
        # botocore has no other way to set credentials that renew themselves.
        session._credentials = botocore.credentials.DeferredRefreshableCredentials(
            method="assume-role", refresh_using=fetcher.fetch_credentials
        )
        return session
