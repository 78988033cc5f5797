"""Settings come from valohai.toml, then from the environment; what is wrong is said with its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from valohai_agent.redis_url import redact
from valohai_dagster.errors import ConfigurationError, RefusedError
from valohai_dagster.settings import Settings, load_settings


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("VALOHAI_STATE")
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def directory_of(settings: Settings, store: str) -> Path:
    section = settings.stores[store]
    assert section.kind == "local"
    return section.path


def write(folder: Path, text: str) -> Path:
    path = folder / "valohai.toml"
    path.write_text(text)
    return path


def test_an_empty_directory_is_a_working_deployment(here: Path) -> None:
    settings = load_settings()
    assert settings.state_dir == here / ".valohai"
    assert directory_of(settings, "local") == here / ".valohai" / "store"
    assert settings.records_url == f"sqlite:///{here}/.valohai/records.db"
    assert settings.group_of(None) == "local"
    assert settings.redis_url is None


def test_the_file_is_found_upwards_and_anchors_relative_paths(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        here,
        '[stores.shared]\npath = "files"\n[groups.local]\nfile_inputs = ["data", "/abs"]\n'
        'shared_cache = "cache"\n',
    )
    deep = here / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    settings = load_settings()
    assert settings.config_file == here / "valohai.toml"
    assert settings.state_dir == here / ".valohai"
    assert directory_of(settings, "shared") == here / "files"
    assert settings.groups["local"].file_inputs == [here / "data", Path("/abs")]
    assert settings.groups["local"].shared_cache == here / "cache"
    assert set(settings.stores) == {"shared", "local"}


def test_environment_variables_win_over_the_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here, 'http_port = 1\n[groups.local]\nslots = 3\nruntime = "docker"\n')
    monkeypatch.setenv("VALOHAI_HTTP_PORT", "99")
    monkeypatch.setenv("VALOHAI_GROUPS__local__SLOTS", "7")
    monkeypatch.setenv("VALOHAI_STATE", "elsewhere")
    settings = load_settings()
    assert settings.http_port == 99
    assert (settings.groups["local"].slots, settings.groups["local"].runtime) == (7, "docker")
    assert settings.state_dir == here / "elsewhere"


def test_named_config_file_is_used_and_must_exist(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = here / "other.toml"
    monkeypatch.setenv("VALOHAI_CONFIG", str(other))
    with pytest.raises(ConfigurationError, match=r"VALOHAI_CONFIG names .*other\.toml"):
        load_settings()
    other.write_text("http_port = 5\n")
    assert load_settings().http_port == 5


def test_settings_are_cached_until_file_or_environment_change(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(here, "http_port = 1\n")
    first = load_settings()
    assert load_settings() is first
    path.write_text("http_port = 2\n")
    os.utime(path, ns=(1, 1))
    assert load_settings().http_port == 2
    monkeypatch.setenv("VALOHAI_HTTP_PORT", "3")
    assert load_settings().http_port == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http_port = \n", r"valohai\.toml is not valid TOML.*line 1"),
        ("redis_ur = 'x'\n", r"redis_ur: there is no such setting; did you mean 'redis_url'\?"),
        (
            "[groups.local]\nslot = 1\n",
            r"groups\.local\.slot: there is no such setting; did you mean 'slots'\?",
        ),
        (
            "[groups.gpu]\nkind = 'aws'\ninstance_type = 'g5.xlarge'\nsecret_access_key = 'x'\n",
            r"no such setting; docs/clouds.md says where a group's credentials come from",
        ),
        ("[groups.local]\nslots = 0\n", r"groups\.local\.slots: .*greater than or equal to 1"),
        ("redis_url = 'http://x'\n", r"redis_url: must start with redis://"),
        (
            "default_store = 'gone'\n",
            r"default_store names the store 'gone', but \[stores\] has 'local'",
        ),
        ("[environments]\nbig = 'gpu'\n", r"big names the group 'gpu', but \[groups\] has 'local'"),
        ("[stores.'a/b']\npath = '/x'\n", r"'a/b' is not a name"),
        (
            "[stores.x]\nkind = 'ftp'\npath = '/x'\n",
            r"stores\.x: kind must be one of local, s3, gcs",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_its_place(
    here: Path, text: str, expected: str
) -> None:
    write(here, text)
    with pytest.raises(ConfigurationError, match=expected):
        load_settings()


def test_undecodable_environment_variable_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALOHAI_STORES", "{not json")
    with pytest.raises(ConfigurationError, match=r"VALOHAI_.*stores"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("VALOHAI_REDIS_URI", "VALOHAI_REDIS_URL"),
        ("valohai_redisurl", "VALOHAI_REDIS_URL"),
        ("VALOHAI_GROUP__local__SLOTS", "VALOHAI_GROUPS__local__SLOTS"),
        ("VALOHAI_CONFIG_FILE", "VALOHAI_CONFIG"),
        ("VALOHAI_STAT", "VALOHAI_STATE"),
        ("VALOHAI_HTPP_PORT", "VALOHAI_HTTP_PORT"),
    ],
)
def test_a_variable_that_looks_like_a_slip_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "s3cret")
    with pytest.raises(ConfigurationError, match=rf"{variable}: .*mean {meant}\?") as caught:
        load_settings()
    assert "s3cret" not in str(caught.value)


def test_a_slip_below_a_known_table_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALOHAI_GROUPS__local__SLOT", "1")
    with pytest.raises(ConfigurationError, match=r"groups\.local\.slot: there is no such setting"):
        load_settings()


def test_variables_of_others_pass_and_unknown_ones_are_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AGENT_REDIS", "GIT_TOKEN", "TEST_DEATH", "ATTEMPT", "TOKEN", "CONFIG_DIR"):
        monkeypatch.setenv(f"VALOHAI_{name}", "s3cret")
    load_settings()
    assert not caplog.records
    monkeypatch.setenv("VALOHAI_COLOUR", "s3cret")
    load_settings()
    load_settings()
    assert [record.message for record in caplog.records] == [
        "the environment variable VALOHAI_COLOUR is no setting; nothing reads it"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "REDIS_PORT",
        "REDIS_SERVICE_HOST",
        "REDIS_SERVICE_PORT",
        "REDIS_SERVICE_PORT_METRICS",
        "REDIS_PORT_6379_TCP",
        "REDIS_PORT_6379_TCP_ADDR",
        "DATABASE_PORT",
        "DATABASE_SERVICE_HOST",
        "WEBSERVER_PORT",
        "SERVICE_HOST",
        "PORT_80_UDP",
    ],
)
def test_variables_that_kubernetes_sets_for_services_pass(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Each pod of a namespace has them for each Service there, such as one named valohai-redis."""
    monkeypatch.setenv(f"VALOHAI_{name}", "tcp://10.0.0.1:6379")
    load_settings()
    assert not caplog.records


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ENVIRONMENT", "GROUP", "PUBLIC_KEY", "LOG_LEVEL"])
def test_variables_of_other_programs_are_not_taken_for_slips(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv(f"VALOHAI_{name}", "x")
    load_settings()
    assert [record.message for record in caplog.records] == [
        f"the environment variable VALOHAI_{name} is no setting; nothing reads it"
    ]


@pytest.mark.parametrize(
    ("variable", "what"),
    [
        ("VALOHAI_STORES__bucket__SECRET_ACCESS_KEY", "store 'bucket'"),
        ("VALOHAI_REGISTRIES__hub__PASSWORD", "registry 'hub'"),
    ],
)
def test_a_secret_of_a_section_that_is_not_here_is_left_out_by_name(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    what: str,
) -> None:
    """It is set for every directory that a person works in."""
    write(here, "[stores.models]\npath = 'models'\n")
    monkeypatch.setenv(variable, "s3cret")
    assert set(load_settings().stores) == {"models", "local"}
    assert f"{variable} is for a {what}" in caplog.text
    assert str(here) in caplog.text
    assert "s3cret" not in caplog.text


def test_a_slip_in_the_name_of_a_store_names_the_variable_and_the_store(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here, "[stores.bucket]\nkind = 's3'\nbucket = 'b'\naccess_key_id = 'id'\n")
    monkeypatch.setenv("VALOHAI_STORES__buket__SECRET_ACCESS_KEY", "s3cret")
    expected = (
        "VALOHAI_STORES__buket__SECRET_ACCESS_KEY: there is no store 'buket'; did you mean 'bucket'"
    )
    with pytest.raises(ConfigurationError, match=expected) as caught:
        load_settings()
    assert "known are bucket, local" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_names_of_stores_that_differ_in_a_digit_are_no_slips(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(here, "[stores.data1]\npath = 'a'\n")
    monkeypatch.setenv("VALOHAI_STORES__data2__READONLY", "true")
    assert "data2" not in load_settings().stores
    assert "VALOHAI_STORES__data2__READONLY" in caplog.text


def test_a_store_of_variables_alone_and_one_with_capitals_in_the_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(here, "[stores.Models]\npath = 'models'\n")
    monkeypatch.setenv("VALOHAI_STORES__other__PATH", "other")
    monkeypatch.setenv("VALOHAI_STORES__local__READONLY", "true")
    monkeypatch.setenv("VALOHAI_STORES__local__PATH", "files")
    monkeypatch.setenv("VALOHAI_STORES__models__READONLY", "true")
    stores = load_settings().stores
    assert set(stores) == {"Models", "other", "local"}
    assert stores["Models"].readonly
    assert not caplog.records


def test_passwords_are_neither_in_the_repr_nor_in_validation_errors(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALOHAI_REDIS_URL", "redis://u:hunter2@host")
    monkeypatch.setenv("VALOHAI_SECRET_KEY", "hunter2")
    assert "hunter2" not in repr(load_settings())
    monkeypatch.setenv("VALOHAI_REDIS_URL", "http://u:hunter2@host")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_e04_an_environment_means_one_group_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {"state_dir": tmp_path, "environments": {"aws-eu-west-1-p3": "local"}}
    )
    assert settings.group_of("aws-eu-west-1-p3") == "local"
    assert settings.group_of("local") == "local"
    with pytest.raises(
        RefusedError, match=r"'nope' is not known here; known are 'aws-.*', 'local'"
    ):
        settings.group_of("nope")


def test_direct_construction_reads_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALOHAI_HTTP_PORT", "99")
    assert Settings(state_dir=tmp_path).http_port != 99


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:pw@h:1/0", "redis://u:***@h:1/0"),
        ("redis://:p%40w@h", "redis://:***@h"),
        ("redis://h:1", "redis://h:1"),
        ("unix:///a/b.sock", "unix:///a/b.sock"),
    ],
)
def test_redacted_urls_keep_everything_but_the_password(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_the_webserver_is_where_it_was_started_last_unless_the_settings_say(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    assert settings.webserver_address == "http://127.0.0.1:3000"
    settings.webserver_file.write_text("http://127.0.0.1:3456\n")
    assert settings.webserver_address == "http://127.0.0.1:3456"
    stated = Settings(state_dir=tmp_path, webserver_url="https://ui.example/")
    assert stated.webserver_address == "https://ui.example"


def test_the_address_for_browsers_is_never_a_wildcard(tmp_path: Path) -> None:
    assert (
        Settings(state_dir=tmp_path, http_host="0.0.0.0", http_port=1).base_url
        == "http://127.0.0.1:1"
    )
    assert Settings(state_dir=tmp_path, public_url="https://x/y/").base_url == "https://x/y"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("kind = 's3'\n", r"stores\.x\.bucket: Field required"),
        ("kind = 's3'\nbucket = 'a/b'\n", r"stores\.x\.bucket: must be a name without slashes"),
        (
            "kind = 's3'\nbucket = 'b'\nregoin = 'eu'\n",
            r"stores\.x\.regoin: there is no such setting; did you mean 'region'\?",
        ),
        (
            "kind = 's3'\nbucket = 'b'\naccess_key_id = 'id'\n",
            r"stores\.x: access_key_id and secret_access_key belong together",
        ),
        (
            "kind = 's3'\nbucket = 'b'\nkms_key_id = 'k'\nencryption = 'AES256'\n",
            r"kms_key_id needs encryption",
        ),
        ("kind = 's3'\nbucket = 'b'\nendpoint_url = 'minio:9000'\n", r"http:// or https://"),
        ("bucket = 'b'\n", r"stores\.x\.bucket: .* state kind = \"s3\" or kind = \"gcs\""),
        (
            "kind = 'gcs'\nbucket = 'b'\nanonymous = true\ncredentials_file = 'x'\n",
            r"state a credentials_file or anonymous",
        ),
        ("kind = 'azure'\ncontainer = 'c'\n", r"account is missing"),
        (
            "kind = 'azure'\ncontainer = 'c'\naccount = 'a'\naccount_key = 'k'\nsas_token = 's'\n",
            r"state one of account_key",
        ),
        (
            "kind = 'swift'\ncontainer = 'c'\nauth_url = 'http://k'\n",
            r"state user and key, or application_credential_id",
        ),
        (
            "kind = 'swift'\ncontainer = 'c'\nauth_url = 'http://k'\nauth_version = 1\n",
            r"auth_version 1 needs user and key",
        ),
        ("kind = 'http'\nbase_url = 'https://me:pw@host'\n", r"must not hold credentials"),
        ("kind = 'http'\nbase_url = 'https://host'\nreadonly = false\n", r"nothing can be written"),
    ],
)
def test_t13_what_is_wrong_with_a_store_is_said(here: Path, section: str, expected: str) -> None:
    write(here, f"[stores.x]\n{section}")
    with pytest.raises(ConfigurationError, match=expected):
        load_settings()


def test_t13_secrets_of_stores_come_from_the_environment_and_are_never_shown(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here, "[stores.models]\nkind = 's3'\nbucket = 'b'\naccess_key_id = 'id'\n")
    monkeypatch.setenv("VALOHAI_STORES__models__SECRET_ACCESS_KEY", "12345")
    monkeypatch.setenv("VALOHAI_STORES__models__PATH_STYLE", "true")
    section = load_settings().stores["models"]
    assert section.kind == "s3"
    assert section.path_style is True
    assert section.secret_access_key is not None
    assert section.secret_access_key.get_secret_value() == "12345"
    assert "12345" not in repr(load_settings())


def test_a_wrong_secret_is_not_in_the_message(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here, "[stores.x]\nkind = 's3'\nbucket = 'b'\n")
    monkeypatch.setenv("VALOHAI_STORES__x__SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_paths_of_key_files_count_from_the_file(here: Path) -> None:
    write(here, "[stores.x]\nkind = 'gcs'\nbucket = 'b'\ncredentials_file = 'key.json'\n")
    section = load_settings().stores["x"]
    assert section.kind == "gcs"
    assert section.credentials_file == here / "key.json"
