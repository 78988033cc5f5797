"""Which refusals of OpenStack are of which kind, by the words of its services."""

from __future__ import annotations

import pytest

from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.clouds.openstack import connection_options
from valohai_dagster.capacity.clouds.openstack_errors import meaning_of
from valohai_dagster.capacity.clouds.refusals import Scope
from valohai_dagster.settings_groups import OpenStackGroupSettings


@pytest.mark.parametrize(
    ("status", "words", "code", "trouble", "scope"),
    [
        (403, "Quota exceeded for ram: Requested 64, but already used 64 of 64 ram", "QuotaExceeded", Trouble.quota, Scope.group),
        (403, "Policy doesn't allow os_compute_api:servers:create to be performed.", "Forbidden", Trouble.credentials, Scope.group),
        (0, "No valid host was found. There are not enough hosts available.", "NoValidHost", Trouble.capacity, Scope.zone),
        (0, "Exceeded maximum number of retries.", "NoValidHost", Trouble.capacity, Scope.zone),
        (0, "Build of instance was aborted", "ServerFault", Trouble.capacity, Scope.zone),
        (400, "The requested availability zone is not available", "NoSuchZone", Trouble.invalid, Scope.zone),
        (400, "Can not find requested image", "BadImage", Trouble.invalid, Scope.group),
        (409, "Multiple possible networks found, use a Network ID to be more specific.", "BadNetwork", Trouble.invalid, Scope.group),
        (503, "network is down", "HTTP 503", Trouble.outage, Scope.group),
        (413, "", "OverLimit", Trouble.throttled, Scope.group),
        (None, "Unable to establish connection", "Unreachable", Trouble.outage, Scope.group),
    ],
)  # fmt: skip
def test_refusals_by_status_and_words(
    status: int | None, words: str, code: str, trouble: Trouble, scope: Scope
) -> None:
    assert meaning_of(status, words) == (code, trouble, scope)


def test_what_the_sdk_finds_out_by_itself() -> None:
    missing = meaning_of(None, "No Image found for x", exception="NotFoundException")
    assert missing.trouble is Trouble.invalid
    unset = meaning_of(None, "Auth plugin requires parameters", exception="MissingRequiredOptions")
    assert unset.trouble is Trouble.credentials


def test_credentials_of_the_settings_need_no_files_and_no_environment() -> None:
    settings = OpenStackGroupSettings.model_validate(
        {
            "kind": "openstack",
            "instance_type": "m1",
            "auth_url": "https://keystone/v3",
            "application_credential_id": "a",
            "application_credential_secret": "s3cret",
        }
    )
    options = connection_options(settings)
    assert options["auth_type"] == "v3applicationcredential"
    assert (options["load_envvars"], options["load_yaml_config"]) == (False, False)
    assert "s3cret" not in repr(settings)
    named = settings.model_copy(update={"cloud": "mine"})
    assert connection_options(named)["cloud"] == "mine"
