"""Telling the Dagster webserver to reload a code location, through its public GraphQL."""

from __future__ import annotations

from typing import Any

from valohai_dagster.errors import RefusedError, ServiceUnavailable

RELOAD_SECONDS = 120.0  # loading a code location imports user code
_MUTATION = """
mutation Reload($location: String!) {
  reloadRepositoryLocation(repositoryLocationName: $location) {
    __typename
    ... on WorkspaceLocationEntry { locationOrLoadError { __typename ... on PythonError { message } } }
    ... on ReloadNotSupported { message }
    ... on RepositoryLocationNotFound { message }
    ... on UnauthorizedError { message }
    ... on PythonError { message }
  }
}
"""


def reload_code_location(webserver_url: str, location: str, *, client: Any = None) -> None:
    """Raises `ServiceUnavailable` when the webserver does not answer, `RefusedError` when it does not reload."""
    import httpx

    url = f"{webserver_url.rstrip('/')}/graphql"
    body = {"query": _MUTATION, "variables": {"location": location}}
    try:
        with client or httpx.Client(timeout=RELOAD_SECONDS) as http:
            reply = http.post(url, json=body)
            reply.raise_for_status()
            data = reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServiceUnavailable(
            f"the Dagster webserver at {webserver_url} did not take the reload of {location!r}: {error}; "
            "check the setting webserver_url and that the webserver runs"
        ) from error
    problem = reload_problem(data)
    if problem:
        raise RefusedError(f"code location {location!r} was not reloaded: {problem}")


def reload_problem(data: Any) -> str | None:
    """What a reply says went wrong, None for a location that loaded."""
    if data.get("errors"):
        return "; ".join(str(error.get("message", error)) for error in data["errors"])
    result = (data.get("data") or {}).get("reloadRepositoryLocation") or {}
    if result.get("__typename") != "WorkspaceLocationEntry":
        return result.get("message") or "an answer that is not understood"
    entry = result.get("locationOrLoadError") or {}
    return entry.get("message") if entry.get("__typename") == "PythonError" else None
