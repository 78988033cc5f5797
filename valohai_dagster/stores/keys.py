"""What a store key may look like, and the wildcards that select keys.

Pure text; no driver repeats any of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from valohai_dagster.errors import StoreBadKey

MAX_KEY_BYTES = 4096
MAX_PART_BYTES = 255  # what file systems take; object stores take more
REMEMBERED = (
    4096  # steps of a pattern that are kept, so that most characters of a listing cost one look-up
)
_TOKENS = re.compile(r"(\*\*/|\*\*|\*)")
_MANY_STARS = re.compile(r"\*{3,}")


def check_key(key: str, *, store: str = "") -> str:
    """The key itself when it is a safe relative path; raises `StoreBadKey` otherwise.

    Refused: nothing, a leading or doubled slash, `.` and `..` parts, NUL, text that is no UTF-8, and parts or keys
    that are too long. Everything else, newlines and leading dashes included, is a legal name.
    """
    problem = _problem(key)
    if problem:
        where = f" in the store {store!r}" if store else ""
        raise StoreBadKey(f"the key {key[:200]!r}{where} is refused: {problem}", store=store)
    return key


def _problem(key: str) -> str | None:
    if not key:
        return "it is empty"
    if "\0" in key:
        return "it contains a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in key):
        return "it is not valid Unicode"
    parts = key.split("/")
    if "" in parts:
        return "it begins or ends with a slash, or has two in a row"
    if "." in parts or ".." in parts:
        return "it has a part '.' or '..'"
    if len(key.encode()) > MAX_KEY_BYTES:
        return f"it is longer than {MAX_KEY_BYTES} bytes"
    if any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return f"a part of it is longer than {MAX_PART_BYTES} bytes"
    return None


def has_wildcard(key: str) -> bool:
    """Whether a key selects by pattern: `*`, or a trailing slash (I-06)."""
    return "*" in key or key.endswith("/") or not key


@dataclass(frozen=True, kw_only=True)
class Wildcard:
    """A key pattern (I-03): `*` within one level, `**` descends, `**/` also matches no directory at all.

    `descend_last` lets a trailing `/*` descend too, which `keep-directories: suffix` and `full` ask for. A pattern
    that ends in `/` means everything below (I-06).
    """

    pattern: str
    descend_last: bool = False

    @property
    def root(self) -> str:
        """The longest literal directory prefix, with its slash or empty (I-21)."""
        return (
            self._full[: self._full.find("*")].rpartition("/")[0] + "/"
            if self._literal_has_dir
            else ""
        )

    def matches(self, key: str) -> bool:
        return self._glob.fits(key)

    @property
    def _literal_has_dir(self) -> bool:
        return "/" in self._full[: self._full.find("*")]

    @property
    def _full(self) -> str:
        pattern = self.pattern
        if pattern.endswith("/") or not pattern:
            return pattern + "**"
        if self.descend_last and (pattern == "*" or pattern.endswith("/*")):
            return pattern + "*"
        return pattern

    @cached_property
    def _glob(self) -> _Glob:
        return _Glob(self._full)


class _Glob:
    """Tells in one pass over a key whether a pattern fits all of it, whatever the pattern: no way is tried twice.

    A key must begin and end with the literal ends of the pattern. For what is between, all places of the pattern where
    one may stand after each character are kept as the bits of a number.
    """

    def __init__(self, pattern: str) -> None:
        tokens = [t for t in _TOKENS.split(_MANY_STARS.sub("**", pattern)) if t]
        wild = [number for number, token in enumerate(tokens) if "*" in token]
        first, last = (wild[0], wild[-1] + 1) if wild else (len(tokens), len(tokens))
        self._prefix, self._suffix = "".join(tokens[:first]), "".join(tokens[last:])
        self._exact = not wild
        self._literals: dict[str, int] = {}  # where that character leads one place on
        self._level = self._deep = (
            0  # where any character but a slash, or any at all, changes nothing
        )
        self._skip = self._skip_two = 0  # from where one gets on without a character
        self._end = 1 << self._lay_out(tokens[first:last])
        self._start = self._settled(1)
        self._known: dict[tuple[int, str], int] = {}

    def _lay_out(self, pieces: list[str]) -> int:
        """Places in the order of the pieces; returns the last one."""
        place = 0
        for piece in pieces:
            bit = 1 << place
            if piece == "**/":  # nothing, or any text and a slash
                self._skip, self._skip_two = self._skip | bit, self._skip_two | bit
                self._deep |= bit << 1
                self._literals["/"] = self._literals.get("/", 0) | bit << 1
                place += 2
            elif "*" in piece:
                self._skip |= bit
                if piece == "**":
                    self._deep |= bit
                else:
                    self._level |= bit
                place += 1
            else:
                for character in piece:
                    self._literals[character] = self._literals.get(character, 0) | 1 << place
                    place += 1
        return place

    def fits(self, key: str) -> bool:
        if self._exact:
            return key == self._prefix
        end = len(key) - len(self._suffix)
        if not (key.startswith(self._prefix) and key.endswith(self._suffix)):
            return False
        if end < len(self._prefix):
            return False
        places, known = self._start, self._known
        for character in key[len(self._prefix) : end]:
            following = known.get((places, character))
            places = self._after(places, character) if following is None else following
            if not places:
                return False
        return bool(places & self._end)

    def _after(self, places: int, character: str) -> int:
        stay = self._deep if character == "/" else self._deep | self._level
        following = self._settled(
            (places & self._literals.get(character, 0)) << 1 | (places & stay)
        )
        if len(self._known) < REMEMBERED:
            self._known[places, character] = following
        return following

    def _settled(self, places: int) -> int:
        """With the places that are reached without a character."""
        while True:
            more = places | (places & self._skip) << 1 | (places & self._skip_two) << 2
            if more == places:
                return places
            places = more
