"""Tokens of Azure Container Registry: a Microsoft Entra token is exchanged at the registry itself."""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import httpx

from valohai_dagster.executions.registries.tokens import MintFailure, Token, require_own_host
from valohai_dagster.settings_registries import AzureRegistrySettings

_HOST = re.compile(r"[a-z0-9-]+\.azurecr\.(?:io|cn|us)")
USERNAME = "00000000-0000-0000-0000-000000000000"  # stands for "the password is a token"
SCOPE = "https://containerregistry.azure.net/.default"
USUAL_LIFE = timedelta(hours=3)  # of the registry's tokens; their own word counts if they have one
_LOOPBACK = ("127.0.0.1", "localhost")  # as for Docker, these may speak plain HTTP


def mint(settings: AzureRegistrySettings, registry: str, now: datetime) -> Token:
    """A refresh token of the registry, good for pulls. Raises `MintFailure`."""
    require_own_host(registry, _HOST, match=settings.match, whose="Azure")
    entra = _entra_token(settings)
    plain = registry.partition(":")[0] in _LOOPBACK
    url = f"{'http' if plain else 'https'}://{registry}/oauth2/exchange"
    form = {"grant_type": "access_token", "service": registry, "access_token": entra}
    if settings.tenant_id is not None:
        form["tenant"] = settings.tenant_id
    try:
        answer = httpx.post(url, data=form, timeout=30)
        answer.raise_for_status()
        token = str(answer.json()["refresh_token"])
    except httpx.HTTPStatusError as error:
        reason = f"{registry} answers the exchange of tokens with {error.response.status_code}"
        raise MintFailure(reason, _advice(settings)) from None
    except httpx.HTTPError as error:
        reason = f"{registry} cannot be asked for a token: {type(error).__name__}: {error}"
        raise MintFailure(reason, "check the registry's name and the network") from None
    except (ValueError, KeyError, TypeError):
        reason = f"{registry} does not answer the exchange of tokens like Azure's registries"
        raise MintFailure(reason, "check that `match` names an Azure registry") from None
    end = _end_of(token) or now + USUAL_LIFE
    return Token(username=USERNAME, password=token, minted_at=now, expires_at=end)


def _entra_token(settings: AzureRegistrySettings) -> str:
    try:
        from azure.core.exceptions import AzureError
    except ImportError as error:
        raise MintFailure(
            "azure-identity is not installed",
            "install the extra: pip install 'valohai-dagster[azure]'",
        ) from error
    try:
        with _credential(settings) as credential:
            return str(credential.get_token(SCOPE).token)
    except (AzureError, ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"Microsoft Entra gives no token: {lines[0][:300]}"
        raise MintFailure(reason, _advice(settings)) from None


def _credential(settings: AzureRegistrySettings) -> Any:
    from azure.identity import ClientSecretCredential, DefaultAzureCredential

    options: dict[str, Any] = {}
    if settings.authority_url is not None:
        options = {"authority": settings.authority_url, "disable_instance_discovery": True}
    if settings.tenant_id and settings.client_id and settings.client_secret:
        secret = settings.client_secret.get_secret_value()
        return ClientSecretCredential(settings.tenant_id, settings.client_id, secret, **options)
    return DefaultAzureCredential(
        exclude_interactive_browser_credential=True,
        exclude_shared_token_cache_credential=True,
        **options,
    )


def _end_of(token: str) -> datetime | None:
    """The `exp` of a JSON web token; None if it is none."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return datetime.fromtimestamp(int(claims["exp"]), timezone.utc)
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _advice(settings: AzureRegistrySettings) -> str:
    if settings.client_id is not None:
        who = "tenant_id, client_id and client_secret, and that this service principal"
    else:
        who = "the control plane's own Azure identity, and that it"
    return f"check {who} has the role AcrPull on the registry"
