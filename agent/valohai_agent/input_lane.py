"""Small input files, many at once by a lane of the transferer; what does not go well there takes the ordinary way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from valohai_agent.cache.local import InputCache, Wanted
from valohai_agent.cache.locks import HeldNames
from valohai_agent.errors import AgentError
from valohai_agent.input_plan import InputFile, Placed
from valohai_agent.input_ways import LocalWay, Source
from valohai_agent.protocol import name_digest
from valohai_agent.transfer import SmallDownload

AT_ONCE = 256  # files whose grants are asked for, and whose names are held, together


class InputLane:
    """Brings small files to their places, and to `cache` if there is one, as `LocalWay.bring` does."""

    def __init__(self, way: LocalWay, source: Source, cache: InputCache | None) -> None:
        self._way, self._source, self._cache = way, source, cache

    def takes(self, item: InputFile) -> bool:
        """Whether it is worth a try: a small file whose server need not be asked what it has."""
        known = self._cache is None or self._source.wanted(item).names
        return bool(known) and self._source.may_be_small(item)

    def bring(self, files: Sequence[InputFile]) -> Iterator[tuple[InputFile, Placed | None]]:
        """Each file as it ends; None for one that `LocalWay.bring` shall see to."""
        for start in range(0, len(files), AT_ONCE):
            with contextlib.ExitStack() as stack:
                names = None
                if self._cache is not None:
                    with contextlib.suppress(OSError):
                        names = stack.enter_context(self._cache.fetching_some())
                yield from self._bring(files[start : start + AT_ONCE], names)

    def _bring(
        self, files: Sequence[InputFile], names: HeldNames | None
    ) -> Iterator[tuple[InputFile, Placed | None]]:
        """Each name is held until its file is there or is left to others, so that nobody else fetches it meanwhile."""
        began = time.monotonic()
        wanted = {item: self._source.wanted(item) for item in files}
        free = [item for item in files if self._hold(wanted[item], names)]
        asked = self._ask(free)
        tried = set(asked.values())
        for item in free:
            if item not in tried:
                self._give_back(wanted[item], names)
        for item in files:
            if item not in tried:
                yield item, None
        for download, moved in self._source.fetch_small(asked):
            item, placed = asked[download], None
            if moved is not None:
                seconds = (time.monotonic() - began) / len(asked)
                with contextlib.suppress(AgentError, OSError):
                    placed = self._way.keep(item, wanted[item], download.target, moved, seconds)
            self._give_back(wanted[item], names)
            yield item, placed

    def _ask(self, files: Sequence[InputFile]) -> dict[SmallDownload, InputFile]:
        """What is to be fetched: neither here by now, nor without a grant for a server."""
        hits = self._way.hits(files)
        asked = {}
        for item in files:
            with contextlib.suppress(AgentError, OSError):
                if item not in hits and self._source.is_small(item):
                    asked[self._way.small(item)] = item
        return asked

    def _hold(self, wanted: Wanted, names: HeldNames | None) -> bool:
        if self._cache is None:
            return True
        return names is not None and names.take(name_digest(wanted.names[0]))

    def _give_back(self, wanted: Wanted, names: HeldNames | None) -> None:
        if names is not None:
            names.give_back(name_digest(wanted.names[0]))
