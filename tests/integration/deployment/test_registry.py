"""T-22: images of a private registry; the credentials are settings and travel in sealed grants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import demand
from tests.support.deployment import Deployment
from tests.support.projects import step_yaml, write_project
from tests.support.redis_server import RedisServer
from tests.support.registry import Registry, missing_programs
from valohai_dagster.executions.stream import ExecutionStatus

if TYPE_CHECKING:
    from docker import DockerClient


@pytest.fixture(scope="module")
def registry(docker_client: DockerClient, tmp_path_factory: pytest.TempPathFactory):
    if missing := missing_programs():
        demand.missing("docker", f"not on PATH: {', '.join(missing)}")
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.stop()


@pytest.fixture
def image(registry: Registry, docker_client: DockerClient) -> Iterator[str]:
    name = registry.push(docker_client, "team/app:1")
    yield name
    for found in docker_client.images.list(name):
        docker_client.images.remove(found.id, force=True)


@pytest.fixture
def deployment(
    registry: Registry, redis_server: RedisServer, tmp_path: Path
) -> Iterator[Deployment]:
    toml = f"""
    redis_url = "{redis_server.unix_url}"
    http_port = 0
    default_group = "far"
    [groups.far]
    kind = "static"
    [registries.ours]
    match = "{registry.address}/team/*"
    username = "{registry.username}"
    """
    with Deployment(tmp_path / "deployment", toml) as deployment:
        yield deployment


def run_step(deployment: Deployment, redis_server: RedisServer, image: str, project: Path):
    deployment.start_conductor()
    agent = deployment.start_agent("far", redis_server.unix_url, "--runtime", "docker")
    written = write_project(project, step_yaml("echo from a private image", image=image))
    return *deployment.execute(written), agent


def everything_in_redis(redis_server: RedisServer) -> bytes:
    with redis_server.client() as client:
        return b"".join(client.dump(key) or b"" for key in client.scan_iter())


def test_a_private_image_is_pulled_with_progress(
    deployment: Deployment,
    registry: Registry,
    redis_server: RedisServer,
    image: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VALOHAI_REGISTRIES__ours__PASSWORD", registry.password)
    view, events, agent = run_step(deployment, redis_server, image, tmp_path / "project")
    assert (view.status, view.reason) == (ExecutionStatus.complete, None)
    messages = [event.message for event in events]
    assert f"pulling {image}" in messages
    assert any(message.startswith("pulling ") and "%" in message for message in messages), messages
    conductor_log = (deployment.root / "valohai_dagster.log").read_text()
    assert registry.password not in agent.log + conductor_log
    assert registry.password.encode() not in everything_in_redis(redis_server)


@pytest.mark.parametrize("password", ["wrong-one", ""])
def test_a_wrong_password_is_told_with_image_and_registry(
    deployment: Deployment,
    registry: Registry,
    redis_server: RedisServer,
    image: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    password: str,
) -> None:
    monkeypatch.setenv("VALOHAI_REGISTRIES__ours__PASSWORD", password)
    view, _, agent = run_step(deployment, redis_server, image, tmp_path / "project")
    assert view.status is ExecutionStatus.error
    reason = str(view.reason)
    assert f"{image!r} cannot be pulled" in reason
    assert f"the registry {registry.address} refuses the user {registry.username!r}" in reason
    assert "registries" in reason
    assert f"match = '{registry.address}/team/*'" in reason  # the pattern that was used
    assert "wrong-one" not in reason + agent.log


def test_an_image_that_needs_credentials_and_has_none_is_told_where_to_put_them(
    deployment: Deployment,
    registry: Registry,
    redis_server: RedisServer,
    image: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VALOHAI_REGISTRIES__ours__PASSWORD", registry.password)
    monkeypatch.setenv("VALOHAI_REGISTRIES__ours__MATCH", "elsewhere.example/*")
    view, _, _ = run_step(deployment, redis_server, image, tmp_path / "project")
    assert view.status is ExecutionStatus.error
    assert f"the registry {registry.address} wants credentials" in str(view.reason)
    assert "[registries." in str(view.reason)


def test_a_token_that_cannot_be_had_is_told_with_its_entry(
    registry: Registry,
    redis_server: RedisServer,
    image: str,
    tmp_path: Path,
) -> None:
    toml = f"""
    redis_url = "{redis_server.unix_url}"
    http_port = 0
    default_group = "far"
    [groups.far]
    kind = "static"
    [registries.images]
    kind = "gcp-ar"
    match = "{registry.address}/*"
    credentials_file = "missing.json"
    """
    with Deployment(tmp_path / "other", toml) as deployment:
        view, events, _ = run_step(deployment, redis_server, image, tmp_path / "project")
    assert view.status is ExecutionStatus.error
    told = [event.message for event in events]
    assert any("[registries.images]" in text and "missing.json" in text for text in told), told
    assert f"the registry {registry.address} wants credentials" in str(view.reason)
    assert "[registries.images]" in str(view.reason)
