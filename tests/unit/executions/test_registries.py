"""Registry credentials by match pattern (T-22)."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from valohai_dagster.executions.registries import full_name, login_for
from valohai_dagster.settings import RegistrySettings

REGISTRIES = {
    "team": RegistrySettings(
        match="registry.example.com:5000/team/*", username="robot", password=SecretStr("pw")
    ),
    "hub": RegistrySettings(match="docker.io/acme/*", username="acme", password=SecretStr("pw2")),
}


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("python", "docker.io/library/python"),
        ("python:3.11", "docker.io/library/python:3.11"),
        ("acme/train", "docker.io/acme/train"),
        ("localhost/x", "localhost/x"),
        ("registry.example.com:5000/team/x:1", "registry.example.com:5000/team/x:1"),
    ],
)
def test_an_image_name_is_completed_as_docker_does(image: str, name: str):
    assert full_name(image) == name


@pytest.mark.parametrize(
    "image",
    [
        "registry.example.com:5000/team/train",
        "registry.example.com:5000/team/train:1.0",
        "registry.example.com:5000/team/train@sha256:" + "0" * 64,
    ],
)
def test_the_credentials_of_the_matching_registry_are_used(image: str):
    login = login_for(image, REGISTRIES)
    assert login is not None
    assert (login.registry, login.username) == ("registry.example.com:5000", "robot")


def test_an_image_of_docker_hub_matches_by_its_full_name():
    login = login_for("acme/train:2", REGISTRIES)
    assert login is not None
    assert login.registry == "docker.io"


def test_other_images_get_no_credentials():
    assert login_for("python:3.11", REGISTRIES) is None
    assert login_for("registry.example.com:5000/other/x", REGISTRIES) is None
