"""Which refusals of a Docker daemon are of which kind, by the words that daemons and registries use."""

from __future__ import annotations

import pytest

from valohai_dagster.capacity.clouds.base import Trouble
from valohai_dagster.capacity.clouds.docker import command_of, machine_name
from valohai_dagster.capacity.clouds.docker_errors import classify


@pytest.mark.parametrize(
    ("status", "words", "code", "trouble"),
    [
        (500, "write /var/lib/x: no space left on device", "NoSpace", Trouble.capacity),
        (500, "no available IPv4 addresses on this network's pool", "NoAddresses", Trouble.capacity),
        (404, "pull access denied for x, repository does not exist", "NoSuchImage", Trouble.invalid),
        (404, "network one not found", "BadNetwork", Trouble.invalid),
        (500, "network is unreachable", "HTTP 500", Trouble.outage),
        (500, "toomanyrequests: pull rate limit", "TooManyRequests", Trouble.throttled),
        (400, "Range of CPUs is from 0.01 to 2.00", "BadRequest", Trouble.invalid),
        (403, "authorization denied by plugin", "Forbidden", Trouble.credentials),
        (None, "Permission denied [Errno 13] Permission denied", "PermissionDenied", Trouble.credentials),
        (None, "Connection refused", "Unreachable", Trouble.outage),
        (503, "", "HTTP 503", Trouble.outage),
    ],
)  # fmt: skip
def test_refusals_by_status_and_words(
    status: int | None, words: str, code: str, trouble: Trouble
) -> None:
    assert classify(status, words) == (code, trouble)


def test_machines_are_named_by_their_launch_alone() -> None:
    name = machine_name("d", "GPU workers", "t", 0)
    assert name.startswith("valohai-gpu-workers-")
    assert name == machine_name("d", "GPU workers", "t", 0)
    others = [("d", "GPU workers", "t", 1), ("d", "GPU workers", "u", 0), ("e", "GPU workers", "t", 0)]  # fmt: skip
    assert name not in {machine_name(*one) for one in others}
    assert len(machine_name("d", "g" * 64, "t", 99)) <= 63  # a host name's length


def test_user_data_is_run_by_the_interpreter_that_it_names() -> None:
    assert command_of("#!/bin/bash -e\ntrue\n")[:2] == ["/bin/bash", "-e"]
    assert command_of("secret")[0] == "/bin/sh"


def test_user_data_is_not_in_the_arguments_of_a_process() -> None:
    assert not any("secret" in one for one in command_of("echo secret"))
