"""Settings of one deployment: `valohai.toml`, overridden by `VALOHAI_*` environment variables.

The file is `$VALOHAI_CONFIG`, else the first `valohai.toml` found from the current directory upwards; it may be
absent. Relative paths count from the file's directory (without a file: from the current directory). A nested
value is set from the environment with `__` between the names, such as `VALOHAI_GROUPS__local__SLOTS=2`.
The field descriptions below are the reference page (`settings_docs.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.sources import PydanticBaseSettingsSource

from valohai_dagster.errors import ConfigurationError, RefusedError
from valohai_dagster.settings_environment import read_environment
from valohai_dagster.settings_file import anchor_paths, file_state, merge_tables, read_toml
from valohai_dagster.settings_groups import GroupSettings, LocalGroupSettings
from valohai_dagster.settings_problems import explain
from valohai_dagster.settings_registries import RegistrySettings
from valohai_dagster.settings_retention import RetentionSettings
from valohai_dagster.settings_sections import placed
from valohai_dagster.settings_stores import StoreSettings

CONFIG_NAME = "valohai.toml"
STATE_NAME = ".valohai"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Settings(BaseSettings):
    """All settings; every one has a default, so that an empty directory is a working deployment."""

    model_config = SettingsConfigDict(
        env_prefix="VALOHAI_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    state_dir: Path = Field(
        default_factory=lambda: Path.cwd() / STATE_NAME,
        description="Directory of everything embedded: records, Redis data, local store, secret key. "
        "Also `VALOHAI_STATE`. Default: `.valohai` beside valohai.toml, or in the current directory.",
    )
    owner: str = Field(
        default="local",
        description="Who owns the projects, as user code reads it: `owner/project`.",
    )
    redis_url: str | None = Field(
        default=None,
        repr=False,
        description="Redis >= 7 or Valkey, `redis://`, `rediss://` or `unix://`. With `rediss://`, certificates are "
        "given as `?ssl_ca_certs=/path/ca.crt&ssl_certfile=/path/me.crt&ssl_keyfile=/path/me.key`. "
        "Default: an embedded server.",
    )
    database_url: str | None = Field(
        default=None,
        repr=False,
        description="Database of the records, such as `postgresql://user:password@host/dagster`. "
        "Default: `records.db` in the state directory (SQLite).",
    )
    stores: dict[str, StoreSettings] = Field(
        default_factory=dict,
        description="Stores by name. Default: one local store named `local` in the state directory.",
    )
    default_store: str = Field(
        default="local", description="Store of outputs and uploads when nothing else is chosen."
    )
    code_store: str | None = Field(
        default=None, description="Store of code archives. Default: `default_store`."
    )
    log_store: str | None = Field(
        default=None, description="Store of complete logs. Default: `default_store`."
    )
    binary_store: str | None = Field(
        default=None,
        description="Store of published agent files (`valohai-dagster agents publish`). Default: `default_store`.",
    )
    groups: dict[str, GroupSettings] = Field(
        default_factory=lambda: {"local": LocalGroupSettings()},
        description="Worker groups by name. Default: one group `local` on this host.",
    )
    default_group: str = Field(
        default="local", description="Group of executions that name no environment."
    )
    environments: dict[str, str] = Field(
        default_factory=dict,
        description="Further environment names, such as slugs of an existing valohai.yaml, and the group that serves each. "
        "Every group's own name is an environment too.",
    )
    registries: dict[str, RegistrySettings] = Field(
        default_factory=dict,
        description="Credentials for private image registries by name; of those whose `match` fits, the longest counts.",
    )
    retention: RetentionSettings = Field(
        default_factory=RetentionSettings,
        description="What is removed after how many days. Default: nothing.",
    )
    http_host: str = Field(
        default="127.0.0.1",
        description="Address on which the service answers `/datum/...` and `/log/...`.",
    )
    http_port: int = Field(
        default=3080,
        ge=0,
        le=65535,
        description="Port of the same. An embedded service that finds it taken picks a free one and keeps it.",
    )
    public_url: str | None = Field(
        default=None,
        description="Address under which browsers reach the service. Default: http_host and http_port.",
    )
    join_url: str | None = Field(
        default=None,
        description="Address under which worker machines reach the service, to join their group and to get their agent. "
        "Default: `public_url`, else http_host and http_port.",
    )
    agent_redis_url: str | None = Field(
        default=None,
        repr=False,
        description="Address under which worker machines reach Redis, if not that of `redis_url`. Without a user in it "
        "each group gets a user of its own, made by us; with one, machines get the address as it is.",
    )
    webserver_url: str | None = Field(
        default=None,
        description="Address of the Dagster webserver, for links. Default: where `valohai-dagster up` was started last, "
        "else `http://127.0.0.1:3000`.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="How the conductor and the local agents log: lines for people, or one JSON object per line.",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        repr=False,
        description="Where OpenTelemetry spans of executions are sent, an OTLP/HTTP address such as "
        "`http://collector:4318`. Default: the variable OTEL_EXPORTER_OTLP_ENDPOINT; without both none are made. "
        "Other OTEL_EXPORTER_OTLP_* variables (headers, time-outs, certificates) apply. Needs the extra `observability`.",
    )
    idle_exit_seconds: float = Field(
        default=300.0,
        ge=0,
        description="An embedded service that was started on demand ends after this long without work.",
    )
    start_conductor: bool = Field(
        default=False,
        description="Start the conductor on demand also when `redis_url` is set. The embedded default always does.",
    )
    unknown_environment: Literal["default", "refuse"] = Field(
        default="default",
        description="What happens to a step whose `environment` is not known here: run in the default group with a "
        "warning in its log, or be refused.",
    )
    lost_grace_seconds: float = Field(
        default=300.0,
        ge=0,
        description="How long a lease may stay unrenewed before the execution is given to another worker.",
    )
    max_infrastructure_attempts: int = Field(
        default=3,
        ge=1,
        description="Attempts of one execution that may be lost to infrastructure before it is an error.",
    )
    grant_seconds: float = Field(
        default=3600.0, gt=0, description="Life of a signed URL that is handed to a worker."
    )
    sweep_after_seconds: float = Field(
        default=3600.0,
        ge=0,
        description="How long after the end of its last URL an upload that nobody reported is removed from its store. "
        "A request that began in time may take that long to end.",
    )
    package_bytes: int = Field(
        default=1024**3,
        ge=64 * 1024,
        le=4 * 1024**3,
        description="Most bytes of one package of a dataset version; a file that does not fit stays a single file.",
    )
    shards: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Into how many parts a new deployment divides its executions; that many conductors can share "
        "them. Read once, when the records are made.",
    )
    time_limit_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Limit for the commands of steps that state none. Default: unlimited.",
    )
    no_output_timeout_seconds: float = Field(
        default=8 * 3600.0,
        gt=0,
        description="Silence after which an execution is stopped, for steps that state none.",
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description="Key that encrypts secrets in the records, 32 bytes as base64. Default: `secret_key_file`.",
    )
    secret_key_file: Path | None = Field(
        default=None,
        description="File with that key. Default: `secret.key` in the state directory, made when missing.",
    )
    config_file: Path | None = Field(
        default=None,
        exclude=True,
        description="The file these settings were read from (not a key).",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Direct construction reads nothing from outside; `load_settings` merges the sources itself."""
        return (init_settings,)

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))

    @field_validator("redis_url", "agent_redis_url")
    @classmethod
    def _redis_scheme(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @field_validator("stores", "groups")
    @classmethod
    def _legal_names(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for name in value:
            check_name(name, info.field_name or "name")
        return value

    @model_validator(mode="before")
    @classmethod
    def _local_store(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "local" in (data.get("stores") or {}):
            return data
        state = Path(data.get("state_dir") or Path.cwd() / STATE_NAME)
        local = {"kind": "local", "path": Path(os.path.abspath(state.expanduser())) / "store"}
        return {**data, "stores": {**(data.get("stores") or {}), "local": local}}

    @model_validator(mode="after")
    def _references(self) -> Settings:
        for field in ("default_store", "code_store", "log_store", "binary_store"):
            name = getattr(self, field)
            if name is not None and name not in self.stores:
                raise ValueError(
                    f"{field} names the store {name!r}, but [stores] has {_names(self.stores)}"
                )
        for slug, group in [("default_group", self.default_group), *self.environments.items()]:
            if group not in self.groups:
                raise ValueError(
                    f"{slug} names the group {group!r}, but [groups] has {_names(self.groups)}"
                )
        return self

    @property
    def code_store_name(self) -> str:
        return self.code_store or self.default_store

    @property
    def log_store_name(self) -> str:
        return self.log_store or self.default_store

    @property
    def binary_store_name(self) -> str:
        return self.binary_store or self.default_store

    @property
    def records_url(self) -> str:
        return self.database_url or f"sqlite:///{self.state_dir / 'records.db'}"

    @property
    def spans_endpoint(self) -> str | None:
        """Where spans go; None when nobody wants them."""
        return self.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None

    @property
    def redis_dir(self) -> Path:
        """Data of the embedded Redis."""
        return self.state_dir / "redis"

    @property
    def port_file(self) -> Path:
        """Holds the port that the service got, so that addresses stay the same for good."""
        return self.state_dir / "http-port"

    @property
    def port(self) -> int:
        try:
            return int(self.port_file.read_text())
        except (OSError, ValueError):
            return self.http_port

    @property
    def base_url(self) -> str:
        """Address of the service for browsers, without a slash at the end."""
        wildcard = self.http_host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
        host = "127.0.0.1" if wildcard else self.http_host
        return (self.public_url or f"http://{host}:{self.port}").rstrip("/")

    @property
    def machines_url(self) -> str:
        """Address of the service for worker machines, without a slash at the end."""
        return (self.join_url or self.base_url).rstrip("/")

    @property
    def webserver_file(self) -> Path:
        """Holds the address on which `valohai-dagster up` was started last."""
        return self.state_dir / "webserver-url"

    @property
    def webserver_address(self) -> str:
        """Address of Dagster's webserver, without a slash at the end."""
        try:
            noted = self.webserver_file.read_text().strip()
        except OSError:
            noted = ""
        return (self.webserver_url or noted or "http://127.0.0.1:3000").rstrip("/")

    def datum_url(self, datum_id: str) -> str:
        """Durable address that opens a datum in a browser."""
        return f"{self.base_url}/datum/{datum_id}"

    def group_of(self, environment: str | None) -> str:
        """The worker group that serves an environment (E-04); None is the default."""
        if environment is None:
            return self.default_group
        if environment in self.environments:
            return self.environments[environment]
        if environment in self.groups:
            return environment
        known = sorted({*self.groups, *self.environments})
        raise RefusedError(
            f"environment {environment!r} is not known here; known are {_names(known)}. Choose one of them, "
            f"or map it in valohai.toml: [environments] {environment!r} = {self.default_group!r}"
        )


def check_name(name: str, what: str) -> str:
    """Refuses names that could not stand in keys, paths and URLs."""
    import re

    if not re.match(NAME_PATTERN, name):
        raise ValueError(f"{what}: {name!r} is not a name (letters, digits, . _ -, at most 64)")
    return name


def find_config(start: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The settings file that applies in a directory, or None."""
    if named := environ.get("VALOHAI_CONFIG"):
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise ConfigurationError(f"VALOHAI_CONFIG names {path}, which is not a file")
        return path
    start = (start or Path.cwd()).absolute()
    return next(
        (path for folder in (start, *start.parents) if (path := folder / CONFIG_NAME).is_file()),
        None,
    )


def load_settings(config: Path | None = None) -> Settings:
    """The settings of this process; read again only when the file's path, its state or the environment changed."""
    config = config.absolute() if config is not None else find_config()
    relevant = tuple(
        sorted((k, v) for k, v in os.environ.items() if k.upper().startswith("VALOHAI_"))
    )
    return _load(config, Path.cwd(), file_state(config), relevant)


@lru_cache(maxsize=8)
def _load(
    config: Path | None, cwd: Path, state: tuple[int, int], environ: tuple[tuple[str, str], ...]
) -> Settings:
    base = config.parent if config is not None else cwd
    written, source = read_toml(config), config or f"no {CONFIG_NAME} found"
    overlaid = placed(read_environment(Settings, dict(environ)), written, dict(environ), source)
    data = merge_tables(written, overlaid)
    state_dir = dict(environ).get("VALOHAI_STATE")
    data["state_dir"] = base / Path(state_dir or data.get("state_dir") or STATE_NAME).expanduser()
    data = anchor_paths(data, base)
    try:
        return Settings(**data, config_file=config)
    except ValidationError as error:
        raise ConfigurationError(explain(error, source, Settings)) from None


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
