"""What machines need before they can work, as far as the settings tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from valohai_dagster.capacity.bootstrap.needs import NO_AGENT, lacks, redis_out_of_reach
from valohai_dagster.settings import Settings
from valohai_dagster.settings_groups import DockerGroupSettings, SimulatedGroupSettings

BOXES = DockerGroupSettings(kind="docker", image="python:3.12")
REDIS, SERVICE = "redis://10.0.0.1:6379/0", "http://10.0.0.1:3080"


def given(tmp_path: Path, **values: Any) -> Settings:
    return Settings(state_dir=tmp_path, **values)


def test_the_embedded_default_has_nothing_that_machines_reach(tmp_path: Path) -> None:
    none, redis, service = lacks(BOXES, given(tmp_path), published=False)
    assert none == NO_AGENT
    assert "the embedded Redis listens on a socket" in redis
    assert service.startswith("join_url is http://127.0.0.1:3080")


def test_addresses_of_this_host_alone_are_named_without_passwords(tmp_path: Path) -> None:
    store = {"kind": "s3", "bucket": "b", "endpoint_url": "http://localhost:9000"}
    here = given(
        tmp_path,
        redis_url="redis://me:hunter2@127.0.0.1:6379/0",
        join_url="http://[::1]:3080",
        default_store="near",
        stores={"near": store},
    )
    found = lacks(BOXES, here, published=True)
    assert [text.split(" is ")[0] for text in found] == [
        "redis_url",
        "join_url",
        "endpoint_url of [stores.near]",
    ]
    assert "hunter2" not in str(found)
    on_this_host = BOXES.model_copy(update={"network": "host"})
    assert lacks(on_this_host, here, published=True) == []


def test_what_is_in_reach_is_well(tmp_path: Path) -> None:
    here = given(tmp_path, redis_url=REDIS, join_url=SERVICE)
    assert lacks(BOXES, here, published=True) == []
    assert lacks(BOXES, here, published=False) == [NO_AGENT]


def test_simulated_machines_need_none_of_it(tmp_path: Path) -> None:
    group = SimulatedGroupSettings(kind="simulated")
    assert lacks(group, given(tmp_path), published=False) == []


@pytest.mark.parametrize("own", [None, "unix:///run/redis.sock"])
def test_a_redis_on_a_socket_has_an_address_of_its_own_for_machines(
    tmp_path: Path, own: str | None
) -> None:
    assert redis_out_of_reach(given(tmp_path, redis_url=own))
    assert redis_out_of_reach(given(tmp_path, redis_url=own, agent_redis_url=REDIS)) is None
