"""Reading the settings file: tables from TOML, values laid over others, paths that count from the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from valohai_dagster.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(config: Path | None) -> dict[str, Any]:
    """The file's tables, none without a file. Raises ConfigurationError naming the file."""
    if config is None:
        return {}
    try:
        return tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the settings file {config}: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the settings file {config} is not valid TOML: {error}"
        ) from error


def file_state(config: Path | None) -> tuple[int, int]:
    """Its time and size, which change with it; zeros when it is not there."""
    try:
        found = config.stat() if config is not None else None
    except OSError:
        found = None
    return (found.st_mtime_ns, found.st_size) if found is not None else (0, 0)


def merge_tables(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` laid over `low`, table by table."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = (
            merge_tables(below, value)
            if isinstance(below, dict) and isinstance(value, dict)
            else value
        )
    return merged


def anchor_paths(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """Relative paths of stores, file inputs, shared caches and key files count from the settings file."""

    def fix(path: Any) -> Any:
        return base / Path(path).expanduser() if isinstance(path, (str, Path)) else path

    data = dict(data)
    for table, key in (
        ("stores", "path"),
        ("stores", "credentials_file"),
        ("groups", "file_inputs"),
        ("groups", "shared_cache"),
        ("registries", "credentials_file"),
    ):
        sections = data.get(table)
        if isinstance(sections, dict):
            data[table] = {
                name: {
                    **section,
                    key: [fix(p) for p in value] if isinstance(value, list) else fix(value),
                }
                if isinstance(section, dict) and (value := section.get(key)) is not None
                else section
                for name, section in sections.items()
            }
    if data.get("secret_key_file"):
        data["secret_key_file"] = fix(data["secret_key_file"])
    return data
