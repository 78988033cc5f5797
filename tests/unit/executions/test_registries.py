"""Registry credentials by match pattern (T-22, A-30, A-31)."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from pydantic import SecretStr

from tests.support.clock import FakeClock
from valohai_agent.runtimes.pulling import registry_of
from valohai_dagster.errors import ConfigurationError, RegistryError
from valohai_dagster.executions.registries import logins as logins_module
from valohai_dagster.executions.registries.logins import RegistryLogins
from valohai_dagster.executions.registries.names import entry_for, full_name
from valohai_dagster.executions.registries.tokens import MintFailure, Token
from valohai_dagster.settings import load_settings
from valohai_dagster.settings_registries import (
    AnyRegistrySettings,
    AzureRegistrySettings,
    DockerRegistrySettings,
    EcrRegistrySettings,
    GoogleRegistrySettings,
)


def docker(match: str, username: str = "robot", password: str = "pw") -> DockerRegistrySettings:
    return DockerRegistrySettings(match=match, username=username, password=SecretStr(password))


REGISTRIES: dict[str, AnyRegistrySettings] = {
    "team": docker("registry.example.com:5000/team/*"),
    "hub": docker("docker.io/acme/*", "acme"),
}


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("python:3.11", "docker.io/library/python:3.11"),
        ("acme/train", "docker.io/acme/train:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("registry.example.com:5000/team/x:1", "registry.example.com:5000/team/x:1"),
        ("registry.example.com:5000/x", "registry.example.com:5000/x:latest"),
        ("ubuntu@sha256:" + "0" * 64, "docker.io/library/ubuntu@sha256:" + "0" * 64),
    ],
)
def test_a31_an_image_name_is_completed_as_docker_does(image: str, name: str):
    assert full_name(image) == name


def test_a31_the_registry_of_an_image_is_the_host_that_serves_it():
    assert registry_of("ubuntu") == "docker.io"
    assert registry_of("127.0.0.1:5000/x") == "127.0.0.1:5000"
    assert registry_of("Registry/x") == "Registry"  # no owner on Docker Hub has a capital letter


@pytest.mark.parametrize(
    ("pattern", "image", "fits"),
    [
        ("docker.io/library/ubuntu:latest", "ubuntu", True),
        ("docker.io/library/ubuntu", "ubuntu:22.04", True),
        ("docker.io/*", "acme/deep/er/train:1", True),  # `*` crosses `/`
        ("gcr.io/proj/reg:*", "gcr.io/proj/reg:7", True),
        ("gcr.io/proj/reg:*", "gcr.io/proj/other:7", False),
        ("gcr.io/proj/reg", "gcr.io/proj/registry", False),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com/*", "ubuntu", False),
        ("registry.example.com/[ab]/*", "registry.example.com/a/x", False),  # only `*` is special
        ("registry.example.com/a.c/*", "registry.example.com/abc/x", False),
        ("registry.example.com/x", "registry.example.com/x@sha256:" + "0" * 64, True),
    ],
)
def test_a31_only_a_star_stands_for_other_text(pattern: str, image: str, fits: bool):
    assert (entry_for(image, {"one": docker(pattern)}) == "one") is fits


@pytest.mark.parametrize(
    ("pattern", "image", "fits"),
    [
        ("*.dkr.ecr.*.amazonaws.com/*", "1.dkr.ecr.eu-west-1.amazonaws.com/a/b:1", True),
        ("1.dkr.ecr.*.amazonaws.com/*", "1.dkr.ecr.evil.com/x.amazonaws.com/y", False),
        ("1.dkr.ecr.*.amazonaws.com/*", "1.dkr.ecr.evil.com.amazonaws.com/y", False),
        ("acme*.azurecr.io/*", "acme2.azurecr.io/x", True),
        ("acme*.azurecr.io/*", "acme.evil.com/a.azurecr.io/b", False),
        ("*-docker.pkg.dev/acme/*", "eu-docker.pkg.dev/acme/x", True),
        ("*-docker.pkg.dev/acme/*", "evil.com/x-docker.pkg.dev/acme/y", False),
        ("acme*/*", "acme.evil.com/x", False),
        ("docker.io*", "acme/x", True),
        ("docker.io*", "docker.io.evil.com/x", False),
        ("127.0.0.1:*/*", "127.0.0.1:5000/x", True),
        ("*.azurecr.io/*", "evil?x.azurecr.io/y", False),
        ("*.azurecr.io/*", "u@evil#.azurecr.io/y", False),
        ("acme.azurecr.io*", "acme.azurecr.io@evil.com/x", False),
        ("*/team/*", "any.where.example/team/x", True),
    ],
)
def test_a31_a_star_in_the_host_stays_between_two_dots(pattern: str, image: str, fits: bool):
    assert (entry_for(image, {"one": docker(pattern)}) == "one") is fits


def test_a31_a_pattern_of_many_stars_takes_no_time():
    """By trying every way it would take longer than any test may."""
    pattern = "docker.io/" + "*a" * 30 + "b"
    assert entry_for("acme/" + "a" * 90, {"one": docker(pattern)}) is None
    assert entry_for("acme/" + "a" * 90 + "b", {"one": docker(pattern)}) == "one"


def test_a31_the_longest_pattern_wins_wherever_it_stands():
    entries = {
        "all": docker("*"),
        "team": docker("r.example.com/team/*"),
        "r": docker("r.example.com/*"),
    }
    assert entry_for("r.example.com/team/x", entries) == "team"
    assert entry_for("r.example.com/other/x", entries) == "r"
    assert entry_for("ubuntu", entries) == "all"


@pytest.mark.parametrize("suffix", ["", ":1.0", "@sha256:" + "0" * 64])
def test_the_credentials_of_the_matching_entry_are_used_and_its_pattern_is_told(suffix: str):
    login = RegistryLogins(REGISTRIES).login_for("registry.example.com:5000/team/train" + suffix)
    assert login is not None
    assert (login.registry, login.username) == ("registry.example.com:5000", "robot")
    assert login.match == "registry.example.com:5000/team/*"


def test_other_images_get_no_credentials():
    assert RegistryLogins(REGISTRIES).login_for("python:3.11") is None
    assert RegistryLogins(REGISTRIES).login_for("registry.example.com:5000/other/x") is None


# -- tokens --------------------------------------------------------------------------------------------------------

AT = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("life", "left", "good"),
    [
        (timedelta(hours=12), timedelta(minutes=16), True),
        (timedelta(hours=12), timedelta(minutes=15), False),
        (timedelta(minutes=20), timedelta(minutes=6), True),
        (timedelta(minutes=20), timedelta(minutes=5), False),
    ],
)
def test_a_token_is_used_until_shortly_before_its_end(life: timedelta, left: timedelta, good: bool):
    token = Token(username="u", password="p", minted_at=AT, expires_at=AT + life)
    assert token.is_good(AT + life - left) is good


def test_tokens_are_minted_once_per_registry_and_again_before_they_run_out(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
):
    minted: list[str] = []

    def mint(settings: GoogleRegistrySettings, registry: str, now: datetime) -> Token:
        minted.append(registry)
        life = timedelta(hours=1)
        return Token(username="u", password=f"t{len(minted)}", minted_at=now, expires_at=now + life)

    monkeypatch.setattr(logins_module.google, "mint", mint)
    entry = GoogleRegistrySettings(kind="gcp-ar", match="*")
    logins = RegistryLogins({"g": entry}, clock=clock)
    images = ["a.pkg.dev/p/x", "a.pkg.dev/p/y:2", "b.pkg.dev/p/x"]
    assert [_password(logins, image) for image in images] == ["t1", "t1", "t2"]
    clock.advance(timedelta(minutes=50).total_seconds())
    assert _password(logins, images[0]) == "t3"
    assert minted == ["a.pkg.dev", "b.pkg.dev", "a.pkg.dev"]


def _password(logins: RegistryLogins, image: str) -> str:
    login = logins.login_for(image)
    assert login is not None
    return login.password


def test_a_mint_that_fails_names_the_entry_and_what_to_check(monkeypatch: pytest.MonkeyPatch):
    def mint(*_: object) -> Token:
        raise MintFailure("the cloud says no", "check the key")

    monkeypatch.setattr(logins_module.google, "mint", mint)
    entry = GoogleRegistrySettings(kind="gcp-ar", match="a.pkg.dev/*")
    with pytest.raises(RegistryError) as raised:
        RegistryLogins({"images": entry}).login_for("a.pkg.dev/p/x")
    text = str(raised.value)
    for part in (
        "a.pkg.dev",
        "the cloud says no",
        "[registries.images]",
        "a.pkg.dev/*",
        "check the key",
    ):
        assert part in text


@pytest.mark.parametrize(
    "entry",
    [
        EcrRegistrySettings(
            kind="aws-ecr", match="*", access_key_id="k", secret_access_key=SecretStr("s")
        ),
        GoogleRegistrySettings(kind="gcp-ar", match="*"),
        AzureRegistrySettings(kind="azure-acr", match="*"),
    ],
    ids=lambda entry: entry.kind,
)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "123456789012.dkr.ecr.eu-west-1.amazonaws.com.evil.example",
        "eu-docker.pkg.dev.evil.example",
        "acme.azurecr.io.evil.example",
        "acme.azurecr.io:8443",
        "127.0.0.1:5000",
    ],
)
def test_no_cloud_token_is_minted_for_a_host_that_is_not_the_clouds(
    entry: AnyRegistrySettings, host: str
):
    with pytest.raises(RegistryError, match="so it gets no token") as raised:
        RegistryLogins({"any": entry}).login_for(f"{host}/team/x")
    assert f'match = "{host}/*"' in str(raised.value)


# -- settings ------------------------------------------------------------------------------------------------------


def test_a30_entries_of_every_kind_are_read_and_secrets_come_from_the_environment(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "valohai.toml"
    config.write_text("""
        [registries.hub]
        match = "docker.io/me/*"
        username = "me"
        [registries.ecr]
        kind = "aws-ecr"
        match = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/*"
        access_key_id = "AK"
        [registries.role]
        kind = "aws-ecr-role"
        match = "*.dkr.ecr.*.amazonaws.com/*"
        [registries.gar]
        kind = "gcp-ar"
        match = "europe-docker.pkg.dev/proj/*"
        credentials_file = "key.json"
        [registries.acr]
        kind = "azure-acr"
        match = "me.azurecr.io/*"
    """)
    monkeypatch.setenv("VALOHAI_REGISTRIES__hub__PASSWORD", "pw-of-hub")
    monkeypatch.setenv("VALOHAI_REGISTRIES__ecr__SECRET_ACCESS_KEY", "key-of-ecr")
    registries = load_settings(config).registries
    assert {name: entry.kind for name, entry in registries.items()} == {
        "hub": "docker",
        "ecr": "aws-ecr",
        "role": "aws-ecr-role",
        "gar": "gcp-ar",
        "acr": "azure-acr",
    }
    assert registries["gar"].credentials_file == tmp_path / "key.json"  # type: ignore[union-attr]
    assert "pw-of-hub" not in repr(registries)
    assert "key-of-ecr" not in repr(registries)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('kind = "quay"\nmatch = "*"', "kind must be one of docker, aws-ecr"),
        ('kind = "aws-ecr-role"\nmatch = "*"\nrole_external_id = "x"', "needs role_arn"),
        ('kind = "azure-acr"\nmatch = "*"\nclient_id = "x"', "belong together"),
        ('kind = "gcp-ar"\nmatch = "*"\ncredential_file = "x"', "did you mean 'credentials_file'"),
    ],
)
def test_a_wrong_entry_is_refused_in_words(tmp_path, entry: str, words: str):
    config = tmp_path / "valohai.toml"
    config.write_text(f"[registries.mine]\n{entry}\n")
    with pytest.raises(ConfigurationError, match=r"registries\.mine") as raised:
        load_settings(config)
    assert words in str(raised.value)
