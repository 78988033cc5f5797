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
        return self._regex.fullmatch(key) is not None

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
    def _regex(self) -> re.Pattern[str]:
        pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
        tokens = re.split(r"(\*\*/|\*\*|\*)", re.sub(r"\*{3,}", "**", self._full))
        return re.compile("".join(pieces.get(t) or re.escape(t) for t in tokens), re.DOTALL)
