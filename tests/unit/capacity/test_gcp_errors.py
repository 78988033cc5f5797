from __future__ import annotations

import pytest

from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.clouds.gcp_errors import ADVICE, CODES, meaning_of, words_of
from valohai_dagster.capacity.clouds.refusals import Scope


@pytest.mark.parametrize(
    ("code", "status", "trouble", "scope"),
    [
        ("ZONE_RESOURCE_POOL_EXHAUSTED", None, Trouble.capacity, Scope.zone),
        ("IP_SPACE_EXHAUSTED", None, Trouble.capacity, Scope.group),
        ("quotaExceeded", 403, Trouble.quota, Scope.purchase),
        ("rateLimitExceeded", 403, Trouble.throttled, Scope.group),
        ("forbidden", 403, Trouble.credentials, Scope.group),
        ("notFound", 404, Trouble.invalid, Scope.group),
        ("UNSUPPORTED_OPERATION", None, Trouble.invalid, Scope.zone),
        ("aWordOfTomorrow", 403, Trouble.credentials, Scope.group),
        ("aWordOfTomorrow", 429, Trouble.throttled, Scope.group),
        ("aWordOfTomorrow", 502, Trouble.outage, Scope.group),
        ("Unreachable", None, Trouble.outage, Scope.group),
    ],
)
def test_codes_mean_a_trouble_and_how_far_it_reaches(
    code: str, status: int | None, trouble: Trouble, scope: Scope
) -> None:
    assert meaning_of(code, status) == (trouble, scope)


def test_every_trouble_has_codes_and_advice() -> None:
    assert {meaning.trouble for meaning in CODES.values()} == set(Trouble) == set(ADVICE)


def test_words_have_neither_the_address_of_the_call_nor_line_breaks() -> None:
    message = "POST https://compute.googleapis.com/compute/v1/projects/p/zones/z: No\n such image."
    assert words_of(message) == "No such image"
    assert len(words_of("x" * 5000)) < 500
