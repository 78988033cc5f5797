"""The short private directory for sockets of one deployment.

Unix socket paths end at about 100 bytes, so sockets do not lie in the state directory itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from valohai_dagster.errors import ConfigurationError

MAX_SOCKET_PATH = 100  # bytes; Linux allows 107, macOS 103


def runtime_dir(state_dir: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """A directory only we can enter, the same for every process that uses this state directory.

    It is `$XDG_RUNTIME_DIR/valohai/<hash>` when that exists and is ours, else `/tmp/valohai-<uid>/<hash>`. A
    directory of another owner, or one that others may enter, is refused: somebody may have put it there.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(state_dir))).hexdigest()[:12]
    directory = _base(environ) / name
    for path in (directory.parent, directory):
        _make_private(path)
    return directory


def _base(environ: Mapping[str, str]) -> Path:
    candidate = environ.get("XDG_RUNTIME_DIR", "")
    if candidate and len(os.fsencode(candidate)) < MAX_SOCKET_PATH - 50:
        path = Path(candidate)
        if path.is_dir() and path.stat().st_uid == os.getuid() and os.access(path, os.W_OK):
            return path / "valohai"
    return Path(f"/tmp/valohai-{os.getuid()}")  # noqa: S108 - made private and checked below


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigurationError(
            f"cannot make the private directory {path} for sockets: {error.strerror}; "
            "set XDG_RUNTIME_DIR to a directory of yours"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigurationError(
            f"{path} is not a private directory of user {os.getuid()} (owner {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):o}); remove it, or set XDG_RUNTIME_DIR to a directory of yours"
        )
