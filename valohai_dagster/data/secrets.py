"""Environment variables in named groups, encrypted in the records (K-70, K-72).

The YAML's `environment-variable-groups` name the groups. Secret values are encrypted, travel only with the grants
and are shown as `***`; plain ones are stored as they are.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox
from nacl.utils import random

from valohai_dagster.errors import ConfigurationError, RefusedError
from valohai_dagster.records.store import upsert
from valohai_dagster.records.tables import secrets
from valohai_dagster.settings import Settings

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = re.compile(
    r"VH_(JOB_ID|EXECUTION_ID|PROJECT_ID|TASK_ID|PIPELINE_.*|(CONFIG|INPUTS|OUTPUTS|REPOSITORY)_DIR)"
)
MAX_GROUP = 255


class SecretKey:
    """The deployment's key: 32 bytes, XSalsa20-Poly1305 with a random nonce per value."""

    def __init__(self, raw: bytes, *, origin: str = "the secret key") -> None:
        if len(raw) != SecretBox.KEY_SIZE:
            raise ConfigurationError(
                f"{origin} has {len(raw)} bytes instead of {SecretBox.KEY_SIZE}; expected base64 of 32 random bytes"
            )
        self._box = SecretBox(raw)
        self._origin = origin

    def __repr__(self) -> str:
        return f"SecretKey({self._origin})"

    def encrypt(self, content: bytes) -> bytes:
        return bytes(self._box.encrypt(content))

    def decrypt(self, sealed: bytes) -> bytes:
        try:
            return self._box.decrypt(sealed)
        except (CryptoError, ValueError) as error:
            raise ConfigurationError(
                f"a stored secret cannot be decrypted with {self._origin}: the key was changed or lost. "
                "Restore it, or set the secrets again with `valohai-dagster secrets set`"
            ) from error

    def derive(self, purpose: str) -> bytes:
        """32 bytes that stand for `purpose`, the same each time; they tell nothing about the key or other purposes."""
        return hmac.digest(bytes(self._box), f"derive\0{purpose}".encode(), "sha256")

    def encrypt_json(self, content: Any) -> bytes:
        return self.encrypt(json.dumps(content).encode())

    def decrypt_json(self, sealed: bytes) -> Any:
        return json.loads(self.decrypt(sealed))


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One variable of a group; `value` is empty when it is secret and no key was given."""

    group: str
    name: str
    value: str = field(repr=False)
    secret: bool
    mtime: datetime


def project_group(project: str) -> str:
    """The group whose variables every execution of that project gets (K-71)."""
    return f"project:{project}"


def variable_groups(named: Sequence[str], project: str) -> list[str]:
    """Weakest first: the groups that a step names, then the project's own variables (K-70, K-73)."""
    return [*named, project_group(project)]


def load_secret_key(settings: Settings) -> SecretKey:
    """The key from `secret_key`, else from the key file, which is made when missing (mode 0600)."""
    if settings.secret_key is not None:
        return _decode(settings.secret_key.get_secret_value(), "secret_key (VALOHAI_SECRET_KEY)")
    path = settings.secret_key_file or settings.state_dir / "secret.key"
    try:
        if not path.exists():
            _create_key_file(path)
        return _decode(path.read_text("ascii"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the secret key {path} cannot be read or made: {error}; set secret_key_file, or VALOHAI_SECRET_KEY"
        ) from error


def set_variable(
    connection: sa.Connection,
    key: SecretKey,
    *,
    group: str,
    name: str,
    value: str,
    now: datetime,
    secret: bool = True,
) -> None:
    """Creates or replaces one variable. Refuses names that are no environment variables or belong to the platform."""
    _check(group, name, value)
    stored = key.encrypt(value.encode()) if secret else value.encode()
    upsert(connection, secrets, group_name=group, name=name, value=stored, secret=secret, mtime=now)


def remove_variable(connection: sa.Connection, *, group: str, name: str) -> bool:
    """Tells whether it was there."""
    c = secrets.c
    return (
        connection.execute(secrets.delete().where(c.group_name == group, c.name == name)).rowcount
        > 0
    )


def list_variables(connection: sa.Connection, group: str | None = None) -> list[Variable]:
    """Variables by group and name, with the values of the plain ones only."""
    query = sa.select(secrets).order_by(secrets.c.group_name, secrets.c.name)
    if group is not None:
        query = query.where(secrets.c.group_name == group)
    return [_variable(row, None) for row in connection.execute(query)]


def variables_of_groups(
    connection: sa.Connection, groups: Sequence[str], key: SecretKey | None = None
) -> list[Variable]:
    """Variables of the groups in their listed order; a later one of the same name wins (K-73).

    Without a key the values of secret variables are empty.
    """
    query = sa.select(secrets).where(secrets.c.group_name.in_(groups)).order_by(secrets.c.name)
    found = [_variable(row, key) for row in connection.execute(query)]
    place = {group: number for number, group in enumerate(groups)}
    return sorted(found, key=lambda variable: place[variable.group])


def unknown_groups(connection: sa.Connection, groups: Sequence[str]) -> list[str]:
    """Names among `groups` that hold no variable."""
    known = set(connection.execute(sa.select(secrets.c.group_name).distinct()).scalars())
    return [group for group in groups if group not in known]


def _variable(row: Any, key: SecretKey | None) -> Variable:
    value = b""
    if not row.secret:
        value = row.value
    elif key is not None:
        value = key.decrypt(row.value)
    return Variable(
        group=row.group_name,
        name=row.name,
        value=value.decode(),
        secret=row.secret,
        mtime=row.mtime,
    )


def _check(group: str, name: str, value: str) -> None:
    if not group.strip() or len(group) > MAX_GROUP or not group.isprintable():
        raise RefusedError(
            f"{group[:80]!r} is no group name: 1 to {MAX_GROUP} printable characters"
        )
    if not _NAME.fullmatch(name) or len(name) > 255:
        raise RefusedError(
            f"{name[:80]!r} is no environment variable name: letters, digits and _, not a digit first"
        )
    if _RESERVED.fullmatch(name):
        raise RefusedError(
            f"{name} is set by the platform for every execution and cannot be overridden (K-73)"
        )
    if "\0" in value:
        raise RefusedError(
            f"the value of {name} contains a NUL character, which no environment variable can hold"
        )


def _decode(text: str, origin: str) -> SecretKey:
    try:
        raw = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigurationError(
            f"{origin} is not base64; expected base64 of 32 random bytes"
        ) from error
    return SecretKey(raw, origin=origin)


def _create_key_file(path: Path) -> None:
    """Made complete beside it and linked, so that of two processes one wins and none reads half a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{random(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(base64.b64encode(random(SecretBox.KEY_SIZE)).decode() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
