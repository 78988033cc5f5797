"""Which files a job wants, where each is to lie, and how inputs.json describes them; no I/O (CONTRACT 5.2, K-33)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from valohai_agent.errors import InputError
from valohai_agent.protocol import Checksums, JobFile, JobInput


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputFile:
    """One file to place: its input, the file, and its path below the inputs directory."""

    input: str
    file: JobFile
    path: PurePosixPath

    @property
    def label(self) -> str:
        """What errors call it; a package belongs to no input."""
        return f"input {self.input!r}, {self.file.uri}" if self.input else self.file.uri


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A file that is in its place. `version`: what its source calls the content."""

    size: int
    checksums: Checksums
    cached: bool = False
    version: str | None = None


def plan_files(
    inputs: Sequence[JobInput],
    *,
    shown: Callable[[PurePosixPath], str],
    warn: Callable[[str], None],
) -> list[InputFile]:
    """One file per target path: of several the last one wins, and the log says so (I-23).

    Raises InputError for names that cannot be placed.
    """
    by_path: dict[PurePosixPath, InputFile] = {}
    for item in inputs:
        for file in item.files:
            path = input_directory(item.name) / _safe_name(item.name, file.name)
            if path in by_path:
                warn(
                    f"Warning: two files of input {item.name!r} have the same path "
                    f"{shown(path)}; the last one is kept."
                )
            by_path[path] = InputFile(input=item.name, file=file, path=path)
    directories = {parent for path in by_path for parent in path.parents}
    for path in by_path.keys() & directories:
        raise InputError(
            f"{shown(path)} is the path of a file, but another file has it as a part of its path. "
            "Use keep-directories or another input for one of them."
        )
    return list(by_path.values())


def describe(
    inputs: Sequence[JobInput],
    placed: Mapping[InputFile, Placed],
    *,
    shown: Callable[[PurePosixPath], str],
) -> dict[str, Any]:
    """The content of inputs.json (K-33, K-35); on-demand inputs have no path (I-36)."""
    entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for wanted, done in placed.items():
        path = shown(wanted.path)
        entries[wanted.input].append(_entry(wanted.file, path, done.size, done.checksums))
    for item in inputs:
        if item.download == "on-demand":
            entries[item.name] = [_entry(f, None, f.size, f.checksums) for f in item.files]
    return {
        item.name: {"input_id": item.input_id, "files": entries.get(item.name, [])}
        for item in inputs
    }


def input_directory(name: str) -> PurePosixPath:
    """Where the files of an input lie."""
    return _safe_name("", name)


def _entry(
    file: JobFile, path: str | None, size: int | None, checksums: Checksums
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": file.name, "size": size, "uri": file.uri}
    if path is not None:
        entry["path"] = path
    entry["checksums"] = checksums.model_dump(exclude_none=True)
    entry["metadata"] = file.metadata
    if file.datum_id is not None:
        entry["datum_id"] = file.datum_id
    return entry


def _safe_name(input_name: str, name: str) -> PurePosixPath:
    """The name as a path below its directory; refused when it would lead out of it."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        where = f" of input {input_name!r}" if input_name else " of an input"
        raise InputError(f"The file name {name!r}{where} cannot be placed below its directory.")
    return PurePosixPath(*parts)
