from __future__ import annotations

import pytest

from valohai_dagster.capacity.clouds.azure_errors import ADVICE, CODES, meaning_of, words_of
from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.clouds.refusals import Scope

_QUOTA = "Operation results in exceeding approved Total Regional Cores Quota"


@pytest.mark.parametrize(
    ("code", "status", "words", "trouble", "scope"),
    [
        ("ZonalAllocationFailed", None, "", Trouble.capacity, Scope.zone),
        ("SkuNotAvailable", 409, "", Trouble.capacity, Scope.zone),
        ("SpotPriceGreaterThanProvidedMaxPrice", 409, "", Trouble.capacity, Scope.purchase),
        ("OperationNotAllowed", 409, _QUOTA, Trouble.quota, Scope.purchase),
        ("OperationNotAllowed", 409, "Not while it is deleted", Trouble.invalid, Scope.group),
        ("OperationNotAllowed", 429, _QUOTA, Trouble.throttled, Scope.group),
        ("AuthorizationFailed", 403, "", Trouble.credentials, Scope.group),
        ("PlatformImageNotFound", 404, "", Trouble.invalid, Scope.group),
        ("AzureSpotIsNotSupportedForThisVMSize", 400, "", Trouble.invalid, Scope.purchase),
        ("AWordOfTomorrow", 401, "", Trouble.credentials, Scope.group),
        ("AWordOfTomorrow", 500, "", Trouble.outage, Scope.group),
        ("Unreachable", None, "", Trouble.outage, Scope.group),
    ],
)
def test_codes_mean_a_trouble_and_how_far_it_reaches(
    code: str, status: int | None, words: str, trouble: Trouble, scope: Scope
) -> None:
    assert meaning_of(code, status, words) == (trouble, scope)


def test_every_trouble_has_codes_and_advice() -> None:
    assert {meaning.trouble for meaning in CODES.values()} == set(Trouble) == set(ADVICE)


def test_words_are_one_line_and_not_too_long() -> None:
    assert words_of("No\n such image.") == "No such image"
    assert len(words_of("x" * 5000)) < 500
