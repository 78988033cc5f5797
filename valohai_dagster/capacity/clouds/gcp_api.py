"""Calls to the Compute Engine API: clients, credentials, operations, and refusals in words.

Every call is made once and has a time limit: whoever scales a group looks again soon, and the library's own repetitions
would go on for ten minutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from valohai_dagster.capacity.clouds.base import CloudError, Trouble
from valohai_dagster.capacity.clouds.gcp_errors import ADVICE, meaning_of, words_of
from valohai_dagster.capacity.clouds.gcp_resources import SCOPE, last
from valohai_dagster.capacity.clouds.refusals import Scope
from valohai_dagster.capacity.model import Purchase
from valohai_dagster.settings_groups import GcpGroupSettings

CALL_SECONDS = 60.0
OPERATION_SECONDS = 180.0
WAIT_SECONDS = 130.0  # one call that waits for an operation; the server answers after two minutes


class _OperationError(Exception):
    """An operation that was accepted and failed."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _CredentialsError(Exception):
    """The key file is not there, or is none."""


class ComputeApi:
    """Clients of one group, made when they are first needed. Raises ImportError when their library is not installed."""

    def __init__(self, group: str, settings: GcpGroupSettings) -> None:
        if find_spec("google.cloud.compute_v1") is None:
            raise ImportError("there is no google-cloud-compute")
        self._group, self._settings = group, settings
        self._clients: dict[str, Any] = {}
        self._credentials: Any = None

    def call(self, service: str, method: str, /, **request: Any) -> Any:
        """`service` as in `InstanceTemplates`. The project is added."""
        return self.call_in(self._settings.project, service, method, **request)

    def call_in(self, project: str, service: str, method: str, /, **request: Any) -> Any:
        """In another project, such as that of public images."""
        request["project"] = project
        timeout = WAIT_SECONDS if method == "wait" else CALL_SECONDS
        function = getattr(self._client(service), method)
        return function(request=request, retry=None, timeout=timeout)

    def finish(self, operation: Any) -> None:
        """Waits for what a call has begun."""
        deadline = time.monotonic() + OPERATION_SECONDS
        while operation.status.name != "DONE" and time.monotonic() < deadline:
            name = operation.name
            if operation.zone:
                zone = last(operation.zone)
                operation = self.call("ZoneOperations", "wait", operation=name, zone=zone)
            else:
                operation = self.call("GlobalOperations", "wait", operation=name)
        for error in operation.error.errors:
            raise _OperationError(error.code, error.message)

    def close(self) -> None:
        for client in self._clients.values():
            client.transport.close()
        self._clients.clear()

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
        trouble, scope = meaning_of(code, status)
        return CloudError(
            f"Google Cloud could not {doing} for the group {self._group!r}: {words_of(words)} ({code}). "
            f"{ADVICE[trouble]}",
            code=code,
            trouble=trouble,
            zone=zone if scope is Scope.zone else None,
            purchase=None if scope is Scope.group else purchase,
            retry_after=retry_after,
        )

    @contextmanager
    def translated(
        self,
        doing: str,
        *,
        zone: str | None = None,
        purchase: Purchase | None = None,
        secret: str = "",
    ) -> Iterator[None]:
        """Makes CloudErrors of what the library raises. `secret`: kept out of its text."""
        import google.auth.exceptions as auth_errors
        import requests
        from google.api_core import exceptions as api_errors

        place: dict[str, Any] = {"zone": zone, "purchase": purchase}
        try:
            yield
        except api_errors.GoogleAPICallError as error:
            words = error.message.replace(secret, "...") if secret else error.message
            code, status = _code(error), error.code
            wait = _retry_after(error)
            if meaning_of(code, status).trouble is Trouble.credentials:
                self._forget_credentials()
            raise self.refusal(
                doing, code, words, status=status, retry_after=wait, **place
            ) from None  # the library's text has what is kept out of ours
        except _OperationError as error:
            raise self.refusal(doing, error.code, str(error), **place) from None
        except auth_errors.TransportError as error:
            raise self.refusal(doing, "Unreachable", _no_answer(error), **place) from error
        except (_CredentialsError, auth_errors.GoogleAuthError) as error:
            raise self._no_credentials(doing, error.__cause__ or error) from None
        except requests.RequestException as error:
            raise self.refusal(doing, "Unreachable", _no_answer(error), **place) from error

    def _no_credentials(self, doing: str, error: BaseException) -> CloudError:
        """A key file that cannot be read, none at all, or an account that gets no token."""
        self._forget_credentials()
        file = self._settings.credentials_file
        source = f"the key file {file}" if file else "Application Default Credentials"
        return CloudError(
            f"Google Cloud could not {doing} for the group {self._group!r}: {source} cannot be used "
            f"({type(error).__name__}). {ADVICE[Trouble.credentials]}",
            code="authError",
            trouble=Trouble.credentials,
        )

    def _forget_credentials(self) -> None:
        """They are read anew, as they may have been corrected."""
        self.close()
        self._credentials = None

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            from google.cloud import compute_v1

            if self._credentials is None:
                self._credentials = self._load_credentials()
            options = {"universe_domain": self._credentials.universe_domain}  # sovereign clouds
            if self._settings.endpoint_url:
                options["api_endpoint"] = self._settings.endpoint_url
            make = getattr(compute_v1, f"{service}Client")
            self._clients[service] = make(credentials=self._credentials, client_options=options)
        return self._clients[service]

    def _load_credentials(self) -> Any:
        import google.auth
        from google.oauth2 import service_account

        file = self._settings.credentials_file
        if file is not None:
            load = service_account.Credentials.from_service_account_file
            try:
                return load(str(file), scopes=[SCOPE])
            except (OSError, ValueError) as error:
                raise _CredentialsError from error
        credentials, _ = google.auth.default(scopes=[SCOPE])
        return credentials


def _code(error: Any) -> str:
    """The reason of the answer, else its status."""
    for one in error.errors:
        reason = one.get("reason") if isinstance(one, dict) else None
        if reason:
            return str(reason)
    return str(error.reason or f"HTTP {error.code}")


def _retry_after(error: Any) -> float | None:
    headers = getattr(error.response, "headers", None) or {}
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def _no_answer(error: Exception) -> str:
    return f"no answer from its API ({type(error).__name__})"
