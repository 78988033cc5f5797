"""The table of AWS errors."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ParamValidationError

from valohai_dagster.capacity.clouds.aws_errors import (
    Meaning,
    Scope,
    cloud_error,
    meaning_of,
    of_exception,
)
from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.model import Purchase


@pytest.mark.parametrize(
    ("code", "status", "trouble", "scope"),
    [
        ("InsufficientInstanceCapacity", 200, Trouble.capacity, Scope.pool),
        ("UnfulfillableCapacity", 200, Trouble.capacity, Scope.pool),
        ("SpotMaxPriceTooLow", 400, Trouble.capacity, Scope.pool),
        ("InsufficientFreeAddressesInSubnet", 400, Trouble.capacity, Scope.zone),
        ("VcpuLimitExceeded", 400, Trouble.quota, Scope.purchase),
        ("MaxSpotInstanceCountExceeded", 400, Trouble.quota, Scope.purchase),
        ("VolumeLimitExceeded", 400, Trouble.quota, Scope.group),
        ("PendingVerification", 400, Trouble.quota, Scope.group),
        ("RequestLimitExceeded", 503, Trouble.throttled, Scope.group),
        ("Throttling", 400, Trouble.throttled, Scope.group),
        ("ThrottlingSomethingNew", 400, Trouble.throttled, Scope.group),
        ("AnythingElse", 429, Trouble.throttled, Scope.group),
        ("UnauthorizedOperation", 403, Trouble.credentials, Scope.group),
        (
            "AuthFailure.ServiceLinkedRoleCreationNotPermitted",
            403,
            Trouble.credentials,
            Scope.group,
        ),
        ("ExpiredToken", 403, Trouble.credentials, Scope.group),
        ("AnythingElse", 403, Trouble.credentials, Scope.group),
        ("NoCredentialsError", 0, Trouble.credentials, Scope.group),
        ("InvalidAMIID.NotFound", 400, Trouble.invalid, Scope.group),
        ("ValidationError", 400, Trouble.invalid, Scope.group),
        ("Unsupported", 400, Trouble.invalid, Scope.zone),
        ("InternalError", 500, Trouble.outage, Scope.group),
        ("Server.InternalError", 200, Trouble.outage, Scope.group),
        ("AnythingElse", 502, Trouble.outage, Scope.group),
        ("EndpointConnectionError", 0, Trouble.outage, Scope.group),
        # Still being worked on: it may have its effect, so the launch must not be given up.
        ("IdempotentCallInProgress", 500, Trouble.outage, Scope.group),
    ],
)
def test_each_code_has_a_trouble_and_a_scope(
    code: str, status: int, trouble: Trouble, scope: Scope
) -> None:
    assert meaning_of(code, status) == Meaning(trouble, scope)


@pytest.mark.parametrize(
    ("code", "zone", "purchase"),
    [
        ("InsufficientInstanceCapacity", "eu-west-1a", Purchase.spot),
        ("VcpuLimitExceeded", None, Purchase.spot),
        ("Unsupported", "eu-west-1a", None),
        ("UnauthorizedOperation", None, None),
    ],
)
def test_an_error_concerns_what_its_scope_says(
    code: str, zone: str | None, purchase: Purchase | None
) -> None:
    error = cloud_error("gpu", "launch", code=code, zone="eu-west-1a", purchase=Purchase.spot)
    assert (error.zone, error.purchase, error.code) == (zone, purchase, code)


def test_words_say_what_was_tried_where_and_what_to_do() -> None:
    text = str(
        cloud_error(
            "gpu",
            "launch g4dn.xlarge",
            code="InsufficientInstanceCapacity",
            text="There is no\n  capacity.",
            zone="eu-west-1a",
            purchase=Purchase.spot,
        )
    )
    assert text.startswith("group gpu: AWS refused to launch g4dn.xlarge as spot in eu-west-1a: ")
    assert "There is no capacity (InsufficientInstanceCapacity)" in text
    assert "[groups.gpu]" in text


def test_encoded_messages_are_left_out() -> None:
    answer = {
        "Error": {
            "Code": "UnauthorizedOperation",
            "Message": "You are not authorized. Encoded authorization failure message: "
            + "abc-DEF_123" * 40,
        },
        "ResponseMetadata": {"HTTPStatusCode": 403},
    }
    error = of_exception(ClientError(answer, "RunInstances"), "gpu", "launch machines")
    assert error.trouble is Trouble.credentials
    assert "You are not authorized" in str(error)
    assert "abc-DEF" not in str(error)


def test_values_of_requests_are_left_out() -> None:
    """botocore repeats a wrong value, and user data holds a join token."""
    wrong = ParamValidationError(
        report="Invalid type for parameter LaunchTemplateData.UserData, value: "
        "{'join': 'secret, token'}, type: <class 'dict'>, valid types: <class 'str'>"
    )
    error = of_exception(wrong, "gpu", "launch machines")
    assert error.trouble is Trouble.invalid
    assert "UserData" in str(error)
    assert "secret" not in str(error)


def test_a_server_that_is_not_there_is_an_outage() -> None:
    error = of_exception(EndpointConnectionError(endpoint_url="https://ec2"), "gpu", "list")
    assert error.trouble is Trouble.outage
    assert "AWS could not be asked to list" in str(error)
    assert "https://ec2" in str(error)


def test_long_words_end_between_two_of_them() -> None:
    text = str(cloud_error("gpu", "launch", code="Odd", text="nothing but words " * 40))
    assert text.split(" (Odd)")[0].split()[-1] in ("nothing", "but", "words")
