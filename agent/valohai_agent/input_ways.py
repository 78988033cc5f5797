"""The ways in which one input file comes to its place: downloaded, from this machine's cache, from a share (I-33, I-34)."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from valohai_agent.cache.local import Cached, InputCache, Wanted, place, readable
from valohai_agent.cache.locks import Waiting
from valohai_agent.cache.placing import copy_file
from valohai_agent.cache.shared import Share, ShareTree
from valohai_agent.errors import (
    ChecksumMismatch,
    Denied,
    DiskFull,
    InputError,
    Refused,
    Unreachable,
)
from valohai_agent.input_grants import InputGrants
from valohai_agent.input_news import InputNews
from valohai_agent.input_plan import InputFile, Placed
from valohai_agent.input_versions import (
    change,
    cut_short,
    looked_up,
    names_met,
    replaced,
    version_met,
)
from valohai_agent.local_files import disk_errors, require_space
from valohai_agent.protocol import Checksums, Transfer
from valohai_agent.transfer import (
    SMALL_BYTES,
    SmallDownload,
    Transferer,
    Transferred,
    is_small,
)

log = logging.getLogger(__name__)

TRIES = 3  # to place a content that somebody else evicts at the very same moment


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A file that was just downloaded. `names`: what may stand for it; `seconds`: how long that took."""

    size: int
    checksums: Checksums
    version: str | None
    names: tuple[str, ...]
    seconds: float

    @property
    def kept_as(self) -> Wanted:
        return Wanted(names=self.names, checksums=self.checksums)


class Source:
    """The stores and servers where inputs come from."""

    def __init__(
        self,
        transferer: Transferer,
        grants: InputGrants,
        news: InputNews,
        cancelled: threading.Event,
    ) -> None:
        self._transferer, self._grants, self._news = transferer, grants, news
        self._cancelled = cancelled

    def wanted(self, item: InputFile) -> Wanted:
        """The names that are known without asking anybody: of the content, then of the version of its source."""
        file = item.file
        names = (file.content_name, file.cache_key, f"datum:{file.datum_id}" * bool(file.datum_id))
        return Wanted(
            names=tuple(dict.fromkeys(name for name in names if name)), checksums=file.checksums
        )

    def ask(self, item: InputFile) -> Wanted:
        """As `wanted`; where nothing is known its server is asked what the content is."""
        wanted = self.wanted(item)
        if wanted.names:
            return wanted
        etag = self._transferer.etag(self._grant(item), name=item.label)
        names = (f"{item.file.uri}#{etag}",) if etag else ()
        return Wanted(names=names, checksums=item.file.checksums)

    def version(self, item: InputFile, wanted: Wanted) -> str | None:
        """What the source called the content, as far as its names tell."""
        return looked_up(item.file, wanted.names)

    def fetch(self, item: InputFile, wanted: Wanted, target: Path) -> Arrived:
        """Downloads the file as it is now, which may be another version than the wanted one. Raises TransferError,
        InputError."""
        began = time.monotonic()
        moved = self._download(item, target)
        return self.arrived(item, wanted, target, moved, time.monotonic() - began)

    def arrived(
        self, item: InputFile, wanted: Wanted, target: Path, moved: Transferred, seconds: float
    ) -> Arrived:
        """What the downloaded file is, and whether another one than was wanted. Raises ChecksumMismatch."""
        readable(target)
        damaged = cut_short(item.file, wanted.names, moved)
        if damaged := damaged or replaced(item.file, wanted.names, moved):
            target.unlink()
            raise ChecksumMismatch(f"{item.label}: {damaged}")
        if changed := change(item.file, wanted.names, moved):
            self._news.changed(item, changed)
        return Arrived(
            size=moved.size,
            checksums=moved.checksums,
            version=version_met(item.file, wanted.names, moved),
            names=names_met(item.file, wanted.names, moved),
            seconds=seconds,
        )

    # -- many small ones -------------------------------------------------------------------------------------------
    def may_be_small(self, item: InputFile) -> bool:
        """Whether a lane of the transferer may be able to fetch it; asks nobody."""
        grant = self._grants.known(item.file.id)
        size = item.file.size
        return size is not None and size <= SMALL_BYTES if grant is None else is_small(grant, size)

    def is_small(self, item: InputFile) -> bool:
        """Whether it surely is. Raises InputError."""
        return is_small(self._grant(item), item.file.size)

    def small_download(self, item: InputFile, target: Path) -> SmallDownload:
        """Raises InputError."""
        return SmallDownload(
            transfer=self._grant(item),
            target=target,
            name=item.label,
            expected=item.file.checksums,
            size=item.file.size if item.file.datum_id is not None else None,
        )

    def fetch_small(
        self, downloads: Iterable[SmallDownload]
    ) -> Iterator[tuple[SmallDownload, Transferred | None]]:
        return self._transferer.download_small(downloads)

    def _download(self, item: InputFile, target: Path) -> Transferred:
        """A signed URL may run out while the file waits for its turn, or on the way.

        The size of a datum is a demand, that of any other file what it was when somebody looked (I-32).
        """
        current, size = self._grant(item), item.file.size
        demanded = size if item.file.datum_id is not None else None
        if demanded is None:
            with disk_errors(item.label, target.parent):
                require_space(target.parent, size, item.label)

        def renew() -> Transfer:
            nonlocal current
            current = self._grants.another(item.file.id, current) or current
            return current

        return self._transferer.download(
            current,
            target,
            name=item.label,
            expected=item.file.checksums,
            size=demanded,
            progress=lambda done, total: self._news.moved(item, done),
            renew=None if current.expires_at is None else renew,
        )

    def waiting(self, item: InputFile, where: str) -> Waiting:
        """How to wait for somebody else who fetches the same content."""

        def check() -> None:
            if self._cancelled.is_set():
                raise Unreachable("cancelled")

        return Waiting(
            tell=lambda seconds: self._news.say(
                item, f"waiting for another execution {where} that is downloading the same file"
            ),
            check=check,
            sleep=self._cancelled.wait,
        )

    def _grant(self, item: InputFile) -> Transfer:
        grant = self._grants.get(item.file.id)
        if grant is None:
            raise InputError(f"{item.label}: the control plane granted no access to it")
        return grant


class ShareSwitch:
    """The share of one job: used until it is in trouble, which is said once."""

    def __init__(self, share: Share | None, warn: Callable[[str], None]) -> None:
        self.share, self._warn = share, warn
        self._lock = threading.Lock()
        trouble = share.trouble() if share is not None else None
        if trouble is not None:
            self.turn_off(trouble)

    def turn_off(self, trouble: object) -> None:
        with self._lock:
            share, self.share = self.share, None
        if share is not None:
            reason = getattr(trouble, "strerror", None) or trouble
            self._warn(
                f"The shared cache {share.directory} is not used: {reason}. "
                "Inputs come from this worker's own cache and from their stores."
            )


class LocalWay:
    """Through the cache of this machine; `arrivals` is a directory on its disk. Misses are looked up on the share too."""

    def __init__(
        self,
        source: Source,
        cache: InputCache | None,
        arrivals: Path | None,
        switch: ShareSwitch,
        *,
        inputs: Path,
        link: bool,
        no_cache: bool,
    ) -> None:
        self._source, self._cache, self._arrivals, self._switch = source, cache, arrivals, switch
        self._inputs, self._link, self._no_cache = inputs, link, no_cache
        self._numbers = itertools.count()

    def hits(self, files: Sequence[InputFile]) -> dict[InputFile, Cached]:
        """What the cache has under names that are known without asking anybody, all looked up at once."""
        if self._cache is None or self._no_cache:
            return {}
        wanted = [(item, self._source.wanted(item)) for item in files]
        known = [(item, one) for item, one in wanted if one.names]
        found = self._cache.find_all([one for _, one in known])
        return {
            item: cached
            for (item, _), cached in zip(known, found, strict=True)
            if cached is not None
        }

    def place_hit(self, item: InputFile, cached: Cached) -> Placed:
        try:
            place(cached, self._inputs / item.path, link=self._link)
        except FileNotFoundError:  # evicted since it was looked up
            return self.bring(item)
        return self._from_cache(item, self._source.wanted(item), cached)

    def bring(self, item: InputFile) -> Placed:
        """Raises TransferError, InputError, OSError."""
        source, cache, target = self._source, self._cache, self._inputs / item.path
        wanted = source.ask(item)
        if cache is None or not wanted.names or not cache.takes(item.file.size):
            fresh = source.fetch(item, wanted, target)
            return Placed(size=fresh.size, checksums=fresh.checksums, version=fresh.version)
        with cache.fetching(wanted.names[0], source.waiting(item, "of this machine")):
            for _ in range(0 if self._no_cache else TRIES):
                cached = cache.find(wanted)
                if cached is None:
                    break
                try:
                    place(cached, target, link=self._link)
                except FileNotFoundError:
                    continue
                return self._from_cache(item, wanted, cached)
            return self._fill(cache, item, wanted, target)

    def _from_cache(self, item: InputFile, wanted: Wanted, cached: Cached) -> Placed:
        return Placed(
            size=cached.size,
            checksums=cached.checksums,
            cached=True,
            version=self._source.version(item, wanted),
        )

    def _fill(self, cache: InputCache, item: InputFile, wanted: Wanted, target: Path) -> Placed:
        arrived = self._arrival()
        fresh, cached = self._fetch(item, wanted, arrived)
        self._keep(cache, fresh, arrived, target)
        return Placed(
            size=fresh.size, checksums=fresh.checksums, cached=cached, version=fresh.version
        )

    def small(self, item: InputFile) -> SmallDownload:
        """To be downloaded to where `keep` takes it from. Raises InputError."""
        kept = self._cache is not None and self._cache.takes(item.file.size)
        return self._source.small_download(
            item, self._arrival() if kept else self._inputs / item.path
        )

    def keep(
        self, item: InputFile, wanted: Wanted, arrived: Path, moved: Transferred, seconds: float
    ) -> Placed:
        """Places what was downloaded as `small` said. Raises TransferError, OSError."""
        fresh = self._source.arrived(item, wanted, arrived, moved, seconds)
        target = self._inputs / item.path
        if self._cache is not None and arrived != target:
            self._keep(self._cache, fresh, arrived, target)
        return Placed(size=fresh.size, checksums=fresh.checksums, version=fresh.version)

    def _arrival(self) -> Path:
        assert self._arrivals is not None
        return self._arrivals / str(next(self._numbers))

    def _keep(self, cache: InputCache, fresh: Arrived, arrived: Path, target: Path) -> None:
        """The job has its link before the cache has the content, so that nobody evicts it in between."""
        entry = Cached(path=arrived, size=fresh.size, checksums=fresh.checksums)
        place(entry, target, link=self._link)
        cache.add(fresh.kept_as, arrived, fresh.size, fresh.checksums, seconds=fresh.seconds)

    def _fetch(self, item: InputFile, wanted: Wanted, arrived: Path) -> tuple[Arrived, bool]:
        """From the share or else from the source, which the share then has too."""
        share, source = self._switch.share, self._source
        if share is None:
            return source.fetch(item, wanted, arrived), False
        fresh: Arrived | None = None
        try:
            with share.fetching(wanted.names[0], source.waiting(item, "of another machine")):
                found = None if self._no_cache else self._copied(share, item, wanted, arrived)
                if found is not None:
                    return found, True
                fresh = source.fetch(item, wanted, arrived)
                _publish(share, arrived, fresh)
        except OSError as error:
            self._switch.turn_off(error)
        return fresh or source.fetch(item, wanted, arrived), False

    def _copied(
        self, share: Share, item: InputFile, wanted: Wanted, arrived: Path
    ) -> Arrived | None:
        began, cached = time.monotonic(), share.find(wanted)
        if cached is None:
            return None
        try:
            with share.arrival() as link:
                os.link(cached.path, link)  # nobody evicts what has a link
                with link.open("rb") as content:
                    copy_file(content, arrived)
        except FileNotFoundError:
            return None
        return Arrived(
            size=cached.size,
            checksums=cached.checksums,
            version=self._source.version(item, wanted),
            names=wanted.names,
            seconds=time.monotonic() - began,
        )


class ShareWay:
    """Used in place: contents are fetched to the share, and the job has links to them there."""

    def __init__(self, source: Source, share: Share, tree: ShareTree, *, no_cache: bool) -> None:
        self._source, self._share, self._tree = source, share, tree
        self._no_cache = no_cache

    def bring(self, item: InputFile) -> Placed:
        """Raises TransferError, InputError, OSError."""
        source, share = self._source, self._share
        wanted = source.ask(item)
        if not wanted.names:
            fresh = source.fetch(item, wanted, self._tree.place_of(item.path))
            return Placed(size=fresh.size, checksums=fresh.checksums, version=fresh.version)
        found = self._found(item, wanted)
        if found is not None:
            return found
        with share.fetching(wanted.names[0], source.waiting(item, "of another machine")):
            found = self._found(item, wanted)
            if found is not None:
                return found
            share.make_room(item.file.size or 0)
            with share.arrival() as arrived:
                fresh = source.fetch(item, wanted, arrived)
                os.link(arrived, self._tree.place_of(item.path))
                share.publish(
                    fresh.kept_as, arrived, fresh.size, fresh.checksums, seconds=fresh.seconds
                )
        return Placed(size=fresh.size, checksums=fresh.checksums, version=fresh.version)

    def _found(self, item: InputFile, wanted: Wanted) -> Placed | None:
        for _ in range(0 if self._no_cache else TRIES):
            cached = self._share.find(wanted)
            if cached is None:
                return None
            try:
                self._tree.link(cached, item.path)
            except FileNotFoundError:
                continue
            return Placed(
                size=cached.size,
                checksums=cached.checksums,
                cached=True,
                version=self._source.version(item, wanted),
            )
        return None


def blames_share(error: Exception) -> bool:
    """Whether the share may be what is wrong, so that the local way is worth trying."""
    if isinstance(error, (Denied, Refused)):
        return isinstance(error.__cause__, OSError)  # of a disk, not of a server
    return isinstance(error, (OSError, DiskFull))


def _publish(share: Share, arrived: Path, fresh: Arrived) -> None:
    share.make_room(fresh.size)
    with share.arrival() as copy:
        with arrived.open("rb") as content:
            copy_file(content, copy)
        share.publish(fresh.kept_as, copy, fresh.size, fresh.checksums, seconds=fresh.seconds)
