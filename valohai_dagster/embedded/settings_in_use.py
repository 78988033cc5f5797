"""Which settings a conductor runs with, told so that others can see what differs from theirs. Pure.

Values are told as keyed digests only: their names are enough to say what to do, and some of them are secrets.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from valohai_dagster.settings import Settings
from valohai_dagster.settings_file import file_state

UNLIKE = frozenset({"config_file"})  # says where they are from, not what they are


def file_stamp(config: Path | None) -> str:
    """Changes with the settings file; empty without one."""
    time, size = file_state(config)
    return f"{config}@{time}-{size}" if time else ""


def digests(settings: Settings, salt: str | None = None) -> dict[str, str]:
    """By name, such as `stores.models.bucket`; the salt under an empty name."""
    salt = secrets.token_hex(16) if salt is None else salt
    told = {"": salt}
    for name, value in _leaves("", settings):
        content = f"{name}={value!r}".encode()
        told[name] = hashlib.blake2b(content, key=salt.encode(), digest_size=12).hexdigest()
    return told


def differing(settings: Settings, in_use: Mapping[str, str]) -> list[str]:
    """Names of the settings that are not those in use; a table that only one side has is named as a whole."""
    mine = digests(settings, in_use.get("", ""))
    names = [name for name in {**mine, **in_use} if mine.get(name) != in_use.get(name)]
    known = {name for told in (mine, in_use) for name in told}
    return sorted({_table(name, mine, in_use, known) for name in names})


def _table(name: str, mine: Mapping[str, str], in_use: Mapping[str, str], known: set[str]) -> str:
    """`stores.models` for `stores.models.bucket` when only one side has such a store."""
    parts = name.split(".")
    if len(parts) < 3:
        return name
    table = ".".join(parts[:2])
    inside = [one for one in known if one.startswith(f"{table}.")]
    both = any(one in mine for one in inside) and any(one in in_use for one in inside)
    return name if both else table


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        value = {field: getattr(value, field) for field in type(value).model_fields}
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            if name or key not in UNLIKE:
                yield from _leaves(f"{name}.{key}" if name else str(key), one)
    else:
        yield name, value.get_secret_value() if isinstance(value, SecretStr) else value
