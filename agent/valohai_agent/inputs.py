"""Brings every input file of a job to `/valohai/inputs` before the first command (CONTRACT 5.2, 5.3)."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from valohai_agent.cache.local import InputCache
from valohai_agent.cache.shared import Share, ShareTree
from valohai_agent.errors import AgentError, DiskFull, InputError
from valohai_agent.input_grants import InputGrants, Renew
from valohai_agent.input_lane import InputLane
from valohai_agent.input_news import InputNews
from valohai_agent.input_packages import Package, PackageWay, plan_packages
from valohai_agent.input_plan import InputFile, Placed, describe, input_directory, plan_files
from valohai_agent.input_ways import LocalWay, ShareSwitch, ShareWay, Source, blames_share
from valohai_agent.protocol import InputReady, InputsReady, JobInput, JobPackage, Transfer
from valohai_agent.transfer import PARALLEL_FILES, Transferer
from valohai_agent.workspace import Workspace

LARGE_BYTES = 16 * 1024 * 1024
LARGE_PARALLEL = 4  # files: each is fetched in several ranges

Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """What one job's inputs go through.

    With `link` files are hard links into the cache, which is safe only where the command sees its inputs read-only.
    On a share they are used in place below `tree`; without one they are copied from there. `no_cache`: everything is
    fetched anew and then kept (K-20). `batches`: the control plane understands many files in one report.
    """

    cache: InputCache | None = None
    share: Share | None = None
    tree: Callable[[Share], ShareTree] | None = None
    link: bool = True
    no_cache: bool = False
    batches: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class InputFetcher:
    """Fetches inputs through the caches and says what it does on the status stream (I-31).

    `renew(file_ids)` asks the control plane for fresh grants (kind `input`) when one is missing, has expired or is
    denied. `progress(done, total)` counts bytes of the whole job and may be called from several threads.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        valohai_dir: str,
        transferer: Transferer,
        options: InputOptions,
        status: Callable[[str], None],
        on_ready: Callable[[InputReady | InputsReady], None],
        warn: Callable[[str], None] | None = None,
        renew: Renew | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._workspace, self._valohai_dir = workspace, valohai_dir
        self._transferer, self._options = transferer, options
        self._status, self._warn, self._on_ready = status, warn or status, on_ready
        self._renew, self._progress = renew, progress
        self.words: str | None = None  # afterwards: what `InputNews.words` says of all files

    def fetch(
        self,
        inputs: Sequence[JobInput],
        grants: Mapping[str, Transfer],
        refused: Mapping[str, str] | None = None,
        packages: Sequence[JobPackage] = (),
    ) -> dict[str, Any]:
        """Downloads everything that is not on-demand; gives the content of inputs.json (K-33, K-35).

        `packages` hold some of the files and may be used instead of fetching those singly (I-09).

        Raises InputError after trying all files, naming each file that failed and why; DiskFull if
        that was the reason, for the next machine may have more room.
        """
        for item in inputs:
            (self._workspace.inputs / input_directory(item.name)).mkdir(parents=True, exist_ok=True)
        fetched = [item for item in inputs if item.download == "always"]
        files = plan_files(fetched, shown=self._shown, warn=self._status)
        placed = self._fetch_all(files, grants, refused or {}, packages) if files else {}
        in_order = {item: placed[item] for item in files}
        return describe(inputs, in_order, shown=self._shown)

    def _fetch_all(
        self,
        files: list[InputFile],
        grants: Mapping[str, Transfer],
        refused: Mapping[str, str],
        packages: Sequence[JobPackage],
    ) -> dict[InputFile, Placed]:
        options = self._options
        box = InputGrants(grants, self._renew)
        with contextlib.ExitStack() as stack:
            news = self._news(files)
            stack.callback(news.close)
            source = Source(self._transferer, box, news, options.cancelled)
            switch = ShareSwitch(options.share, self._warn)
            cache = options.cache
            arrivals = None if cache is None else stack.enter_context(cache.arrivals())
            local = LocalWay(
                source,
                cache,
                arrivals,
                switch,
                inputs=self._workspace.inputs,
                link=options.link,
                no_cache=options.no_cache,
            )
            fetch = _Fetch(self._workspace, options, source, switch, local, box, news, refused)
            planned = plan_packages(packages, fetch.missing(files), refused) if packages else []
            if planned:
                scratch = (arrivals or self._workspace.run) / "packages"
                fetch.unpack(self._package_way(source, switch, scratch, news), planned)
            placed = fetch.run(files)
            self.words = news.words()
            return placed

    def _package_way(
        self, source: Source, switch: ShareSwitch, scratch: Path, news: InputNews
    ) -> PackageWay:
        """Packages lie in a directory of their own until they are unpacked; a link there keeps them from eviction."""
        options = self._options
        arrivals, directory = scratch / "coming", scratch / "here"
        for path in (arrivals, directory):
            path.mkdir(parents=True, exist_ok=True)
        way = LocalWay(
            source,
            options.cache,
            arrivals,
            switch,
            inputs=directory,
            link=True,
            no_cache=options.no_cache,
        )
        return PackageWay(
            way,
            directory,
            inputs=self._workspace.inputs,
            cache=options.cache,
            news=news,
            warn=self._warn,
            cancelled=options.cancelled,
        )

    def _news(self, files: list[InputFile]) -> InputNews:
        return InputNews(
            Counter(item.input for item in files),
            shown=lambda item: self._shown(item.path) if item.input else item.file.uri,
            status=self._status,
            report=self._on_ready,
            batches=self._options.batches,
            progress=self._progress,
            total=_total(files),
            warn=self._warn,
        )

    def _shown(self, path: PurePosixPath) -> str:
        return f"{self._valohai_dir}/inputs/{path}"


@dataclass
class _Fetch:
    """Places the files of one job."""

    workspace: Workspace
    options: InputOptions
    source: Source
    switch: ShareSwitch
    local: LocalWay
    grants: InputGrants
    news: InputNews
    refused: Mapping[str, str]
    placed: dict[InputFile, Placed] = field(default_factory=dict)
    problems: list[tuple[InputFile, Exception]] = field(default_factory=list)
    unpacked: set[str] = field(default_factory=set)  # inputs with files out of packages

    def missing(self, files: list[InputFile]) -> list[InputFile]:
        """Those that no look-up without a question finds on this machine."""
        hits = self.local.hits(files)
        return [item for item in files if item not in hits]

    def unpack(self, way: PackageWay, planned: Sequence[Package]) -> None:
        """Places what packages bring; `run` then places the rest."""
        self.placed.update(way.bring_all(way.choose(planned)))
        self.unpacked = {item.input for item in self.placed}

    def run(self, files: list[InputFile]) -> dict[InputFile, Placed]:
        """An input lies wholly on this machine or wholly on the share: one that is here already stays here."""
        total, files = len(files), [item for item in files if item not in self.placed]
        self.grants.expect(item.file.id for item in files)
        hits = self.local.hits(files)
        elsewhere = {item.input for item in files if item not in hits} - self.unpacked
        rest = self._on_share(files, elsewhere)
        for directory in {item.path.parent for item in rest}:
            (self.workspace.inputs / directory).mkdir(parents=True, exist_ok=True)
        missing = [item for item in rest if item not in hits]
        if missing and self.options.cache is not None:
            self.options.cache.make_room(sum(item.file.size or 0 for item in missing))
        here = [item for item in rest if item in hits]
        self._keep(self._each(here, lambda item: self.local.place_hit(item, hits[item])))
        lane = InputLane(self.local, self.source, self.options.cache)
        self._keep(self._each(missing, self.local.bring, None if self.switch.share else lane))
        if self.problems:
            raise _failure(self.problems, total)
        return self.placed

    def _on_share(self, files: list[InputFile], inputs: set[str]) -> list[InputFile]:
        """Places these inputs on the share, as far as that works; gives the files that are still to be placed."""
        share, rest = self.switch.share, files
        if share is None or self.options.tree is None or not inputs:
            return rest
        try:
            tree = self.options.tree(share)
            way = ShareWay(self.source, share, tree, no_cache=self.options.no_cache)
            wanted = [item for item in files if item.input in inputs]
            results = self._each(wanted, way.bring, tell=False)
        except OSError as error:
            self.switch.turn_off(error)
            return rest
        fallen: dict[str, Exception] = {}
        for item, result in results:
            if isinstance(result, Exception) and blames_share(result):
                fallen.setdefault(item.input, result)
        for error in fallen.values():
            self.switch.turn_off(error)
        done = [(item, result) for item, result in results if item.input not in fallen]
        for name in inputs - fallen.keys():
            self.workspace.in_place[name] = tree.root / input_directory(name)
        for item, result in done:
            if isinstance(result, Placed):
                self.news.ready(item, result)
        self._keep(done)
        return [item for item in files if item.input in fallen or item.input not in inputs]

    def _each(
        self,
        files: Sequence[InputFile],
        bring: Callable[[InputFile], Placed],
        lane: InputLane | None = None,
        *,
        tell: bool = True,
    ) -> list[tuple[InputFile, Placed | Exception]]:
        """All of them at once, as far as that is useful; a failure of one stops no other.

        Small ones go by the lane first, if there is one, while threads fetch the others.
        """

        def settle(item: InputFile, placed: Placed) -> None:
            self.grants.settle(item.file.id)
            if tell:
                self.news.ready(item, placed)

        def one(item: InputFile) -> Placed:
            if item.file.id in self.refused:
                raise InputError(f"{item.label}: {self.refused[item.file.id]}")
            try:
                placed = bring(item)
            except BaseException:
                self.grants.settle(item.file.id)
                raise
            settle(item, placed)
            return placed

        ours = [item for item in files if item.file.id not in self.refused]
        quick = [] if lane is None else [item for item in ours if lane.takes(item)]
        by_lane = set(quick)
        results: dict[InputFile, Placed] = {}
        with (
            ThreadPoolExecutor(LARGE_PARALLEL, "inputs") as large,
            ThreadPoolExecutor(PARALLEL_FILES, "inputs") as small,
        ):
            pools = {True: small, False: large}
            futures = {
                item: pools[_is_small(item)].submit(one, item)
                for item in files
                if item not in by_lane
            }
            for item, placed in lane.bring(quick) if lane is not None else ():
                if placed is None:
                    futures[item] = small.submit(one, item)
                else:
                    settle(item, placed)
                    results[item] = placed
        return [(item, results.get(item) or _result(futures[item])) for item in files]

    def _keep(self, results: Iterable[tuple[InputFile, Placed | Exception]]) -> None:
        for item, result in results:
            if isinstance(result, Placed):
                self.placed[item] = result
            else:
                self.problems.append((item, result))


def _is_small(item: InputFile) -> bool:
    return item.file.size is not None and item.file.size < LARGE_BYTES


def _result(future: Future[Placed]) -> Placed | Exception:
    """Raises what is nobody's expected failure."""
    try:
        return future.result()
    except (AgentError, OSError) as error:
        return error


def _total(files: Iterable[InputFile]) -> int | None:
    total = 0
    for item in files:
        if item.file.size is None:
            return None
        total += item.file.size
    return total


def _failure(problems: Sequence[tuple[InputFile, Exception]], files: int) -> AgentError:
    errors = [error for _, error in problems]
    text = "; ".join(str(error) for error in errors[:10])
    more = f" (and {len(errors) - 10} more)" if len(errors) > 10 else ""
    kind = DiskFull if any(isinstance(error, DiskFull) for error in errors) else InputError
    failure = kind(f"{len(errors)} of {files} input files failed: {text}{more}")
    failure.__cause__ = errors[0]
    return failure
