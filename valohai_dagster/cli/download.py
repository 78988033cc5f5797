"""Writes stored files below a directory: checked, never half, never over something else."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

from valohai_dagster.errors import RefusedError, StoreError
from valohai_dagster.stores.registry import Stores

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Target:
    """One stored file and where it goes. `name` is the datum's name, `/` as separator."""

    store: str
    key: str
    sha256: str | None
    size: int
    directory: Path
    name: str

    @property
    def path(self) -> Path:
        """Raises RefusedError for a name that leads out of the directory."""
        parts = PurePosixPath(self.name).parts
        if not parts or PurePosixPath(self.name).is_absolute() or ".." in parts:
            raise RefusedError(f"the name {self.name!r} leads out of {self.directory}")
        return self.directory.joinpath(*parts)


def download_all(
    targets: Iterable[Target], stores: Stores, *, overwrite: bool = False, quiet: bool = False
) -> list[Path]:
    """Fetches all files with a progress bar; a file that is there already with this content is left alone."""
    targets = list(targets)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console) as bar:
        total = bar.add_task("downloading", total=sum(t.size for t in targets))
        paths = []
        for target in targets:
            bar.update(total, description=target.name)
            paths.append(fetch(target, stores, overwrite=overwrite, advance=_advancer(bar, total)))
    return paths


def _advancer(bar: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda count: bar.advance(task, count)


def fetch(
    target: Target,
    stores: Stores,
    *,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Writes beside the final name, compares the checksum, then renames."""
    path = target.path
    if path.exists() and not overwrite:
        if path.is_file() and target.sha256 and _digest(path) == target.sha256:
            advance(target.size)
            return path
        raise RefusedError(f"{path} exists and is something else; move it away or use --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".download-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file, stores.get(target.store).open(target.key) as source:
            found = _copy(source, file, advance)
        if target.sha256 and found != target.sha256:
            raise StoreError(
                f"{target.name}: the stored bytes have sha256 {found}, recorded was {target.sha256}; "
                "the store's content was changed behind our back",
                store=target.store,
            )
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _copy(source: BinaryIO, file: BinaryIO, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        file.write(chunk)
        advance(len(chunk))
    return digest.hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
