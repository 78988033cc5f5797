"""Tokens of Google Artifact Registry: an OAuth access token is the password."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

from valohai_dagster.executions.registries.tokens import MintFailure, Token, require_own_host
from valohai_dagster.settings_registries import GoogleRegistrySettings

_HOST = re.compile(r"[a-z0-9-]+\.pkg\.dev|(?:[a-z]+\.)?gcr\.io")
USERNAME = "oauth2accesstoken"
SCOPES = (
    "https://www.googleapis.com/auth/cloud-platform",
)  # Artifact Registry knows no narrower one


def mint(settings: GoogleRegistrySettings, registry: str, now: datetime) -> Token:
    """A token of the service account. Raises `MintFailure`."""
    require_own_host(registry, _HOST, match=settings.match, whose="Google")
    try:
        from google.auth.exceptions import GoogleAuthError
    except ImportError as error:
        raise MintFailure(
            "google-auth is not installed", "install the extra: pip install 'valohai-dagster[gcp]'"
        ) from error
    try:
        credentials = _credentials(settings)
        credentials.refresh(_request())
    except (GoogleAuthError, OSError, ValueError) as error:
        raise MintFailure(f"Google gives no token: {_words(error)}", _advice(settings)) from error
    expiry = credentials.expiry
    return Token(
        username=USERNAME,
        password=credentials.token,
        minted_at=now,
        expires_at=expiry.replace(tzinfo=timezone.utc) if expiry else None,
    )


def _credentials(settings: GoogleRegistrySettings) -> Any:
    import google.auth
    from google.oauth2 import service_account

    if settings.credentials_file is None:
        credentials, _ = google.auth.default(scopes=SCOPES)
        return credentials
    return service_account.Credentials.from_service_account_file(
        str(settings.credentials_file), scopes=SCOPES
    )


def _request() -> Any:
    from google.auth.transport.requests import Request

    return Request()


def _words(error: Exception) -> str:
    """The first argument of the library's errors is the sentence; what follows may be the whole answer."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    return str(error.args[0] if error.args else error)[:300]


def _advice(settings: GoogleRegistrySettings) -> str:
    if settings.credentials_file is not None:
        return (
            f"check that {settings.credentials_file} is the key of a living service account with the role "
            "Artifact Registry Reader"
        )
    return (
        "check the control plane's Application Default Credentials (GOOGLE_APPLICATION_CREDENTIALS, or the service "
        "account of the machine), and their role Artifact Registry Reader"
    )
