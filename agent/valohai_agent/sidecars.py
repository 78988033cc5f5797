"""Reads metadata that user code writes beside its outputs (O-06, O-07)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from valohai_agent.beneath import NotRegular, Place
from valohai_agent.metadata import parse_object

SUFFIX = ".metadata.json"
COLLECTION = "valohai.metadata.jsonl"
MAX_SIDECAR_BYTES = 4 * 1024 * 1024
MAX_LINE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Content of `valohai.metadata.jsonl`: metadata by file name; `valid` when every line was."""

    by_name: dict[str, dict[str, Any]] = field(default_factory=dict)
    valid: bool = True


def sidecar_target(name: str) -> str | None:
    """The output a sidecar's name belongs to, or None when it is no sidecar's name."""
    target = name.removesuffix(SUFFIX)
    return target if target != name and target.rpartition("/")[2] else None


def read_sidecar(place: Place, name: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The sidecar's object; None with a warning when it is not one JSON object."""
    try:
        with place.open() as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
        if len(data) > MAX_SIDECAR_BYTES:
            warn(f"{name!r} is larger than {MAX_SIDECAR_BYTES} bytes and is not read as metadata.")
            return None
        value = parse_object(data.decode("utf-8-sig"))
    except NotRegular:
        return None
    except (OSError, UnicodeDecodeError):
        value = None
    if value is None:
        warn(f"{name!r} is not a JSON object; it is stored as an ordinary file.")
    return value


def read_collection(place: Place, warn: Callable[[str], None]) -> Collection:
    """Merges the lines of `valohai.metadata.jsonl` by file; later keys win."""
    by_name: dict[str, dict[str, Any]] = {}
    bad: list[int] = []
    try:
        with place.open() as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                if line.strip() and not _take(line, by_name):
                    bad.append(number)
    except (FileNotFoundError, NotRegular):
        return Collection()
    except OSError as error:
        warn(f"{COLLECTION} cannot be read: {error.strerror}.")
        return Collection(valid=False)
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (" ..." if len(bad) > 10 else "")
        warn(
            f'{COLLECTION}: not of the form {{"file": "...", "metadata": {{...}}}} on line {shown}; '
            "these lines are skipped and the file is stored as an ordinary output too."
        )
    return Collection(by_name=by_name, valid=not bad)


def _take(line: bytes, by_name: dict[str, dict[str, Any]]) -> bool:
    try:
        entry = parse_object(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return False
    if entry is None:
        return False
    name, metadata = entry.get("file"), entry.get("metadata")
    if not isinstance(name, str) or not isinstance(metadata, dict):
        return False
    by_name.setdefault(normal_name(name), {}).update(metadata)
    return True


def normal_name(name: str) -> str:
    """`./a//b` and `a/b` are the same output."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))
