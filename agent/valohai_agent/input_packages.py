"""Brings files of a job by the packages that hold them, where that is quicker than one by one (I-09).

A package is fetched, checked and kept like any input; what is unpacked are copies of the job's own. Whatever goes
wrong with a package is said, and its files are fetched one by one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from valohai_agent.cache.local import InputCache
from valohai_agent.checksums import decimal_size
from valohai_agent.errors import AgentError, InputError
from valohai_agent.input_news import InputNews
from valohai_agent.input_plan import InputFile, Placed
from valohai_agent.input_ways import LocalWay
from valohai_agent.package_files import Member, footprint, unpack_package
from valohai_agent.protocol import JobFile, JobPackage

PARALLEL_PACKAGES = 4  # each is fetched in several ranges


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package to fetch, and the files that are wanted of it, by the name of the member."""

    item: InputFile
    files: Mapping[str, Sequence[InputFile]]

    @property
    def size(self) -> int:
        return self.item.file.size or 0

    @property
    def wanted_bytes(self) -> int:
        """What the wanted files take in the package."""
        return sum(footprint(items[0].file.size or 0) for items in self.files.values())


def plan_packages(
    packages: Sequence[JobPackage], missing: Sequence[InputFile], refused: Collection[str] = ()
) -> list[Package]:
    """Those that have something that is missing, and that the control plane has not refused."""
    by_id = {item.file.id: item for item in missing}
    planned = []
    for package in packages:
        files: dict[str, list[InputFile]] = {}
        for item in (by_id[file_id] for file_id in package.files if file_id in by_id):
            if item.file.datum_id is not None:
                files.setdefault(item.file.datum_id, []).append(item)
        if files and package.id not in refused:
            planned.append(Package(item=_as_input(package), files=files))
    return planned


def worthwhile(package: Package, *, cached: bool) -> bool:
    """One that has to be fetched is worth it when at least half of it is wanted."""
    return cached or 2 * package.wanted_bytes >= package.size


class PackageWay:
    """`bring` for the packages of one job. `way` puts a package below `directory`, `inputs` is where files go."""

    def __init__(
        self,
        way: LocalWay,
        directory: Path,
        *,
        inputs: Path,
        cache: InputCache | None,
        news: InputNews,
        warn: Callable[[str], None],
        cancelled: threading.Event,
    ) -> None:
        self._way, self._directory, self._inputs = way, directory, inputs
        self._cache, self._news, self._warn = cache, news, warn
        self._cancelled = cancelled

    def choose(self, planned: Sequence[Package]) -> list[Package]:
        """Those worth it; what has to be fetched of them gets room."""
        hits = self._way.hits([package.item for package in planned])
        chosen = [one for one in planned if worthwhile(one, cached=one.item in hits)]
        if self._cache is not None and chosen:
            self._cache.make_room(sum(one.size for one in chosen if one.item not in hits))
        return chosen

    def bring_all(self, packages: Sequence[Package]) -> dict[InputFile, Placed]:
        """The files that are in their places afterwards; the others have to come by another way."""
        placed: dict[InputFile, Placed] = {}
        with ThreadPoolExecutor(PARALLEL_PACKAGES, "packages") as pool:
            for found in pool.map(self._bring, packages):
                placed.update(found)
        return placed

    def _bring(self, package: Package) -> dict[InputFile, Placed]:
        placed: dict[InputFile, Placed] = {}
        try:
            for item, one in self._unpacked(package):
                placed[item] = one
        except (AgentError, OSError) as error:
            self._give_up(package, error)
        else:
            rest = sum(map(len, package.files.values())) - len(placed)
            if rest:
                self._give_up(package, InputError(f"{rest} of its files are not in it"))
        self._news.moved(package.item, 0)  # its bytes count as those of the files
        return placed

    def _unpacked(self, package: Package) -> Iterator[tuple[InputFile, Placed]]:
        members = {
            name: Member(
                label=items[0].label,
                size=items[0].file.size,
                checksums=items[0].file.checksums,
                places=tuple(self._inputs / item.path for item in items),
            )
            for name, items in package.files.items()
        }
        for parent in {place.parent for member in members.values() for place in member.places}:
            parent.mkdir(parents=True, exist_ok=True)
        archive = self._directory / package.item.path
        left = package.size
        try:
            fetched = self._way.bring(package.item)
            verb = "from cache" if fetched.cached else "downloaded"
            self._news.say(package.item, f"{verb}, {decimal_size(fetched.size)}")
            for done in unpack_package(archive, members):
                for item in package.files[done.name]:
                    left = max(0, left - done.size)
                    self._news.moved(package.item, left)
                    one = Placed(size=done.size, checksums=done.checksums, cached=fetched.cached)
                    self._news.ready(item, one)
                    yield item, one
        finally:
            with contextlib.suppress(FileNotFoundError):
                archive.unlink()

    def _give_up(self, package: Package, error: Exception) -> None:
        if not self._cancelled.is_set():
            text = str(error).removeprefix(f"{package.item.label}: ")
            self._warn(
                f"{package.item.file.uri} cannot be used: {text}. Its files are fetched one by one."
            )


def _as_input(package: JobPackage) -> InputFile:
    file = JobFile(
        id=package.id,
        name=package.id,
        uri=package.uri,
        size=package.size,
        checksums=package.checksums,
    )
    return InputFile(input="", file=file, path=PurePosixPath(package.id))
