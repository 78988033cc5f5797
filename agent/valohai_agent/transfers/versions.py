"""What a source calls the content of one answer: only what it says there counts for the bytes that came with it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from valohai_agent.transfers.ranges import identity, strong_etag


@dataclass(frozen=True, kw_only=True)
class Version:
    """One content in the words of its source, each where the source has one.

    `asked`: as `Transferer.etag` would tell it. The others are as stores describe their objects: the ETag without
    quotes, the generation (Google Cloud Storage), or size and time of the last change.
    """

    asked: str | None = None
    etag: str | None = None
    generation: str | None = None
    dated: str | None = None

    def confirms(self, known: str) -> bool:
        """Whether the content is the one that was called so before."""
        return known in (self.asked, self.etag, self.generation, self.dated)

    def contradicts(self, known: str) -> bool:
        """Whether the content is surely another one: the source told the same kind of thing, and it differs."""
        if known.isdecimal():
            told = self.generation
        elif re.fullmatch(r"\d+-\d+", known):  # may look like the ETag of an upload in parts, too
            told = self.dated
        else:
            told = None if known.startswith("W/") else self.etag
        return told is not None and not self.confirms(known)

    def like(self, known: str | None) -> str | None:
        """The word for this content that says the same kind of thing as `known`; None when the source told nothing.

        `known` None: as `Transferer.etag` would tell it.
        """
        if known is None:
            return self.asked
        if self.confirms(known):
            return known
        if known.isdecimal():
            return self.generation or self.etag or self.dated
        return self.etag or self.dated or self.generation


def version_of_answer(headers: Mapping[str, str], size: int) -> Version:
    """`headers` (lower-case names) of the answer that brought the whole content of `size` bytes, or its beginning."""
    etag, changed = strong_etag(headers), _seconds(headers.get("last-modified"))
    return Version(
        asked=identity(headers),
        etag=etag.strip('"') if etag else None,
        generation=headers.get("x-goog-generation"),
        dated=None if changed is None else f"{size}-{changed}",
    )


def version_of_file(status: os.stat_result) -> Version:
    return Version(
        asked=f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}",
        dated=f"{status.st_size}-{status.st_mtime_ns}",
    )


@functools.lru_cache(
    maxsize=1024
)  # many files of one source were often written within a few seconds
def _seconds(text: str | None) -> int | None:
    try:
        return int(parsedate_to_datetime(text).timestamp()) if text else None
    except (TypeError, ValueError):
        return None
