"""Brings every input file of a job to `/valohai/inputs` before the first command (CONTRACT 5.2, 5.3)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from valohai_agent.cache import InputCache, place
from valohai_agent.checksums import decimal_size
from valohai_agent.errors import AgentError, Denied, DiskFull, InputError, Unreachable
from valohai_agent.protocol import Checksums, InputReady, JobFile, JobInput, Transfer
from valohai_agent.transfer import Transferer
from valohai_agent.workspace import Workspace

EXPIRY_MARGIN = timedelta(seconds=30)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """One file to place: its input, the file, and its path below the inputs directory."""

    input: str
    file: JobFile
    path: PurePosixPath


@dataclass(frozen=True, kw_only=True)
class _Placed:
    size: int
    checksums: Checksums
    cached: bool = False


class InputFetcher:
    """Fetches inputs through the cache and says what it does on the status stream (I-31).

    `renew(file_ids)` asks the control plane for fresh grants (kind `input`) when one is missing, has
    expired or is denied. `progress(done, total)` counts bytes of the whole job and may be called from
    several threads. With `link` files are hard links into the cache, which is safe only where the
    command sees its inputs read-only: by default where `valohai_dir` is `/valohai`.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        valohai_dir: str,
        transferer: Transferer,
        cache: InputCache | None,
        status: Callable[[str], None],
        on_ready: Callable[[InputReady], None],
        renew: Callable[[list[str]], Mapping[str, Transfer]] | None = None,
        progress: Callable[[int, int | None], None] | None = None,
        no_cache: bool = False,
        link: bool | None = None,
        parallel: int = 4,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._workspace = workspace
        self._valohai_dir = valohai_dir
        self._transferer = transferer
        self._cache = cache
        self._status = status
        self._on_ready = on_ready
        self._renew = renew
        self._progress = progress
        self._no_cache = no_cache
        self._link = valohai_dir == "/valohai" if link is None else link
        self._parallel = parallel
        self._now = now
        self._grants: dict[str, Transfer] = {}
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._total: int | None = None

    def fetch(
        self,
        inputs: Sequence[JobInput],
        grants: Mapping[str, Transfer],
        refused: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Downloads everything that is not on-demand; gives the content of inputs.json (K-33, K-35).

        Raises InputError after trying all files, naming each file that failed and why; DiskFull if
        that was the reason, for the next machine may have more room.
        """
        for item in inputs:
            (self._workspace.inputs / _input_directory(item.name)).mkdir(exist_ok=True)
        self._grants.update(grants)
        wanted = self._plan([item for item in inputs if item.download == "always"])
        sizes = [item.file.size for item in wanted]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        placed = self._fetch_all(wanted, refused or {})
        return {item.name: self._describe(item, wanted, placed) for item in inputs}

    def _plan(self, inputs: Sequence[JobInput]) -> list[_Wanted]:
        """One file per target path: of several the last one wins, and the log says so (I-23)."""
        by_path: dict[PurePosixPath, _Wanted] = {}
        for item in inputs:
            for file in item.files:
                path = _input_directory(item.name) / _safe_name(item.name, file.name)
                if path in by_path:
                    self._status(
                        f"Warning: two files of input {item.name!r} have the same path "
                        f"{self._shown(path)}; the last one is kept."
                    )
                by_path[path] = _Wanted(input=item.name, file=file, path=path)
        for path in by_path:
            if any(parent in by_path for parent in path.parents):
                raise InputError(
                    f"{self._shown(path)} cannot be placed: a part of its path is a file too. "
                    "Use keep-directories or another input for one of them."
                )
        return list(by_path.values())

    def _fetch_all(
        self, wanted: list[_Wanted], refused: Mapping[str, str]
    ) -> dict[PurePosixPath, _Placed]:
        with ThreadPoolExecutor(max_workers=self._parallel) as pool:
            futures = [(item, pool.submit(self._fetch_one, item, refused)) for item in wanted]
        placed: dict[PurePosixPath, _Placed] = {}
        problems: list[Exception] = []
        for item, future in futures:
            try:
                placed[item.path] = future.result()
            except (AgentError, OSError) as error:
                problems.append(error)
        if problems:
            text = "; ".join(str(error) for error in problems[:10])
            more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
            kind = DiskFull if any(isinstance(e, DiskFull) for e in problems) else InputError
            raise kind(f"{len(problems)} of {len(wanted)} input files failed: {text}{more}") from (
                problems[0]
            )
        return placed

    def _fetch_one(self, item: _Wanted, refused: Mapping[str, str]) -> _Placed:
        if item.file.id in refused:
            raise InputError(f"input {item.input!r}, {item.file.uri}: {refused[item.file.id]}")
        target = self._workspace.inputs / item.path
        target.parent.mkdir(parents=True, exist_ok=True)
        placed = self._place(item, target)
        self._tell(item, placed)
        return placed

    def _place(self, item: _Wanted, target: Path) -> _Placed:
        key = self._cache_key(item) if self._cache is not None else None
        if self._cache is None or key is None:
            return self._download(item, target)
        with self._cache.locked(key):
            cached = None if self._no_cache else self._cache.find(key, item.file.checksums)
            if cached is None:
                self._cache.make_room(item.file.size or 0)
                partial = self._cache.partial()
                fresh = self._download(item, partial)
                entry = self._cache.add(key, partial, fresh.size, fresh.checksums)
                place(entry.path, target, link=self._link)
                return fresh
            place(cached.path, target, link=self._link)
        self._count(item, cached.size)
        return _Placed(size=cached.size, checksums=cached.checksums, cached=True)

    def _cache_key(self, item: _Wanted) -> str | None:
        """Content identity: known by the control plane, a datum (immutable), or what the server says."""
        if item.file.cache_key:
            return item.file.cache_key
        if item.file.checksums.sha256:
            return f"sha256:{item.file.checksums.sha256.lower()}"
        if item.file.datum_id:
            return f"datum:{item.file.datum_id}"
        etag = self._transferer.etag(self._grant(item), name=self._error_name(item))
        return f"{item.file.uri}#{etag}" if etag else None

    def _download(self, item: _Wanted, target: Path) -> _Placed:
        for renewed in (False, True):
            grant = self._grant(item, fresh=renewed)
            try:
                moved = self._transferer.download(
                    grant,
                    target,
                    name=self._error_name(item),
                    expected=item.file.checksums,
                    size=item.file.size,
                    progress=lambda done, total: self._count(item, done),
                )
            except (Denied, Unreachable):
                # A signed URL may have run out while the file waited for its turn.
                if renewed or self._renew is None or grant.expires_at is None:
                    raise
                continue
            target.chmod(0o644)
            return _Placed(size=moved.size, checksums=moved.checksums)
        raise AssertionError("unreachable")

    def _grant(self, item: _Wanted, *, fresh: bool = False) -> Transfer:
        with self._lock:
            grant = self._grants.get(item.file.id)
        expired = grant is not None and (
            grant.expires_at is not None and grant.expires_at - EXPIRY_MARGIN < self._now()
        )
        if (grant is None or expired or fresh) and self._renew is not None:
            renewed = dict(self._renew([item.file.id]))
            with self._lock:
                self._grants.update(renewed)
            grant = renewed.get(item.file.id, grant)
        if grant is None:
            raise InputError(f"{self._error_name(item)}: the control plane granted no access to it")
        return grant

    def _tell(self, item: _Wanted, placed: _Placed) -> None:
        path, size = self._shown(item.path), decimal_size(placed.size)
        with self._lock:  # the four lines of a file stay together
            self._status(f"{path}: {'from cache' if placed.cached else 'downloaded'}, {size}")
            if not placed.cached:
                self._status(f"{path}: md5 sum: {placed.checksums.md5}")
                self._status(f"{path}: sha1 sum: {placed.checksums.sha1}")
                self._status(f"{path}: sha256 sum: {placed.checksums.sha256}")
        self._on_ready(
            InputReady(
                input=item.input,
                file_id=item.file.id,
                name=item.file.name,
                size=placed.size,
                checksums=placed.checksums,
                cached=placed.cached,
            )
        )

    def _count(self, item: _Wanted, done: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done[str(item.path)] = done
            total_done = sum(self._done.values())
        self._progress(total_done, self._total)

    def _describe(
        self, item: JobInput, wanted: list[_Wanted], placed: Mapping[PurePosixPath, _Placed]
    ) -> dict[str, Any]:
        if item.download == "on-demand":
            files = [_entry(file, None, file.size, file.checksums) for file in item.files]
        else:
            files = [
                _entry(w.file, self._shown(w.path), placed[w.path].size, placed[w.path].checksums)
                for w in wanted
                if w.input == item.name
            ]
        return {"input_id": item.input_id, "files": files}

    def _shown(self, path: PurePosixPath) -> str:
        return f"{self._valohai_dir}/inputs/{path}"

    def _error_name(self, item: _Wanted) -> str:
        return f"input {item.input!r}, {item.file.uri}"


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


def _input_directory(name: str) -> PurePosixPath:
    return _safe_name("", name)


def _safe_name(input_name: str, name: str) -> PurePosixPath:
    """The name as a path below its directory; refused when it would lead out of it."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        where = f" of input {input_name!r}" if input_name else " of an input"
        raise InputError(f"The file name {name!r}{where} cannot be placed below its directory.")
    return PurePosixPath(*parts)
