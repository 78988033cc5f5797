"""What the refusals of stores mean to an upload."""

from __future__ import annotations

import pytest

from valohai_agent.errors import Conflict, Denied
from valohai_agent.transfers.retries import Expired, status_error


@pytest.mark.parametrize(
    ("status", "code"),
    [(409, "BlobAlreadyExists"), (412, "PreconditionFailed"), (403, "UnauthorizedBlobOverwrite")],
)
def test_a_taken_key_is_a_conflict_whatever_the_store_calls_it(status: int, code: str) -> None:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
    error = status_error(status, "", {}, "store.example.com", "a.bin", body)
    assert isinstance(error, Conflict)
    assert "a.bin" in str(error)


def test_a_missing_permission_is_worth_a_fresh_signature() -> None:
    body = b"<Error><Code>AuthorizationPermissionMismatch</Code></Error>"
    error = status_error(403, "", {}, "store.example.com", "a.bin", body)
    assert isinstance(error, Expired)
    assert isinstance(error.error, Denied)
