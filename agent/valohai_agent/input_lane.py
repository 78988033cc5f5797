"""Small input files, many at once by a lane of the transferer; what does not go well there takes the ordinary way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from valohai_agent.cache.local import InputCache, Wanted
from valohai_agent.cache.locks import Waiting
from valohai_agent.errors import AgentError
from valohai_agent.input_plan import InputFile, Placed
from valohai_agent.input_ways import LocalWay, Source
from valohai_agent.transfer import SmallDownload

AT_ONCE = 256  # files whose names are held: each takes a file descriptor


class _Busy(Exception):
    """Somebody else fetches that content just now."""


def _refuse() -> None:
    raise _Busy


class InputLane:
    """Brings small files to their places, and to `cache` if there is one, as `LocalWay.bring` does."""

    def __init__(self, way: LocalWay, source: Source, cache: InputCache | None) -> None:
        self._way, self._source, self._cache = way, source, cache

    def takes(self, item: InputFile) -> bool:
        """Whether it is worth a try: a small file whose server need not be asked what it has."""
        known = self._cache is None or self._source.wanted(item).names
        return bool(known) and self._source.is_small(item)

    def bring(self, files: Sequence[InputFile]) -> Iterator[tuple[InputFile, Placed | None]]:
        """Each file as it ends; None for one that `LocalWay.bring` shall see to."""
        for start in range(0, len(files), AT_ONCE):
            yield from self._bring(files[start : start + AT_ONCE])

    def _bring(self, files: Sequence[InputFile]) -> Iterator[tuple[InputFile, Placed | None]]:
        """Names are held until all of these files are there, so that nobody else fetches one meanwhile."""
        with contextlib.ExitStack() as held:
            free = [item for item in files if self._hold(item, held)]
            hits = self._way.hits(free)
            began = time.monotonic()
            asked: dict[SmallDownload, tuple[InputFile, Wanted]] = {}
            for item in free:
                with contextlib.suppress(AgentError, OSError):
                    if item not in hits:
                        wanted = self._source.wanted(item)
                        asked[self._way.small(item)] = item, wanted
            placed = {item for item, _ in asked.values()}
            for item in files:
                if item not in placed:
                    yield item, None
            each = 1 / max(1, len(asked))
            for download, moved in self._source.fetch_small(asked):
                item, wanted = asked[download]
                if moved is None:
                    yield item, None
                    continue
                seconds = (time.monotonic() - began) * each
                try:
                    yield item, self._way.keep(item, wanted, download.target, moved, seconds)
                except (AgentError, OSError):
                    yield item, None

    def _hold(self, item: InputFile, held: contextlib.ExitStack) -> bool:
        if self._cache is None:
            return True
        try:
            name = self._source.wanted(item).names[0]
            held.enter_context(self._cache.fetching(name, Waiting(check=_refuse)))
        except (_Busy, OSError):
            return False
        return True
