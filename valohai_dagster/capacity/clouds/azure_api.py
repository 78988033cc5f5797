"""Calls to the Azure Resource Manager: client, credentials, and refusals in words.

Every call is made once and has a time limit: whoever scales a group looks again soon.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from valohai_dagster.capacity.clouds.azure_errors import ADVICE, meaning_of, words_of
from valohai_dagster.capacity.clouds.base import CloudError, Trouble
from valohai_dagster.capacity.clouds.refusals import Scope
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import AzureGroupSettings

CONNECT_SECONDS, READ_SECONDS = 10, 60


class ResourceManager:
    """The client of one group, made when it is first needed. Raises ImportError when its library is not installed."""

    def __init__(self, group: str, settings: AzureGroupSettings) -> None:
        for name in ("azure.mgmt.compute", "azure.identity"):
            if find_spec(name) is None:
                raise ImportError(f"there is no {name.replace('.', '-')}")
        self._group, self._settings = group, settings
        self._made: Any = None
        self._credential: Any = None

    @property
    def client(self) -> Any:
        if self._made is None:
            from azure.mgmt.compute import ComputeManagementClient

            settings, options = self._settings, {}
            if settings.endpoint_url:
                base = settings.endpoint_url.rstrip("/")
                options = {"base_url": base, "credential_scopes": [f"{base}/.default"]}
            self._credential = self._credential or self._load_credential()
            self._made = ComputeManagementClient(
                self._credential,
                settings.subscription_id,
                retry_total=0,
                connection_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                **options,
            )
        return self._made

    def get(self, path: str, *, api_version: str) -> Any:
        """What another service has there, such as the network's. Raises what the library raises."""
        from azure.core.rest import HttpRequest

        request = HttpRequest("GET", path, params={"api-version": api_version})
        with self.client.send_request(request) as response:
            response.raise_for_status()
            return response.json()

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
            self._made = None
        if self._credential is not None:
            self._credential.close()
            self._credential = None

    def refusal(
        self,
        doing: str,
        code: str,
        words: str,
        *,
        status: int | None = None,
        zone: str | None = None,
        purchase: Purchase | None = None,
        retry_after: float | None = None,
    ) -> CloudError:
        """`zone` and `purchase` of the request; the error has them as far as the refusal reaches."""
        trouble, scope = meaning_of(code, status, words)
        return CloudError(
            f"Azure could not {doing} for the group {self._group!r}: {words_of(words)} ({code}). {ADVICE[trouble]}",
            code=code,
            trouble=trouble,
            zone=zone if scope is Scope.zone else None,
            purchase=None if scope is Scope.group else purchase,
            retry_after=retry_after,
        )

    @contextmanager
    def translated(
        self, doing: str, *, zone: str | None = None, purchase: Purchase | None = None
    ) -> Iterator[None]:
        """Makes CloudErrors of what the library raises."""
        from azure.core import exceptions as azure_errors

        place: dict[str, Any] = {"zone": zone, "purchase": purchase}
        try:
            yield
        except azure_errors.HttpResponseError as error:
            status = error.status_code
            signing_in = status is None or not _is_api(error)
            if isinstance(error, azure_errors.ClientAuthenticationError) and signing_in:
                raise self._no_token(doing, error) from None
            words = getattr(error.error, "message", None) or error.reason or "no reason given"
            raise self.refusal(
                doing, _code(error), words, status=status, retry_after=_retry_after(error), **place
            ) from None
        except azure_errors.AzureError as error:
            words = f"no answer from its API ({type(error).__name__})"
            raise self.refusal(doing, "Unreachable", words, **place) from error

    def _no_token(self, doing: str, error: Exception) -> CloudError:
        """The text of the library is not shown: it names all that it has tried, over many lines."""
        account = self._settings.client_id or "what azure-identity finds"
        words = f"{account} gets no token ({type(error).__name__})"
        return self.refusal(doing, "AuthenticationFailed", words)

    def _load_credential(self) -> Any:
        from azure import identity

        settings = self._settings
        private = {"disable_instance_discovery": True} if settings.endpoint_url else {}
        if settings.client_secret is not None:
            try:
                return identity.ClientSecretCredential(
                    settings.tenant_id or "",
                    settings.client_id or "",
                    settings.client_secret.get_secret_value(),
                    retry_total=0,
                    **private,
                )
            except ValueError as error:
                raise CloudError(
                    f"Azure gives no token for the group {self._group!r}: client_secret needs a tenant_id and a client_id "
                    "beside it. Correct them, or leave client_secret out.",
                    code="AuthenticationFailed",
                    trouble=Trouble.credentials,
                ) from error
        options: dict[str, Any] = dict(private)
        if settings.client_id:
            options["managed_identity_client_id"] = settings.client_id
        return identity.DefaultAzureCredential(**options)


def _is_api(error: Any) -> bool:
    """The Resource Manager itself answered, not the one that gives tokens."""
    return error.error is not None and bool(error.error.code)


def _code(error: Any) -> str:
    code = getattr(error.error, "code", None)
    return str(code or f"HTTP {error.status_code}")


def _retry_after(error: Any) -> float | None:
    headers = getattr(error.response, "headers", None) or {}
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None
