"""Where input files lie below `/valohai/inputs/<input>/` (I-20 to I-25). Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from valohai_agent.protocol import JobFile

KeepDirectories = Literal["none", "suffix", "full"]
UNNAMED = "download"  # a URL without a usable last segment
MARK = 8  # characters of the digest that stands for the values of a query
_WEB = ("http://", "https://")
_NAME = re.compile(r"[\w.~%\[\]$:-]{1,100}", re.ASCII)
_PIECE = rf"(?:{_NAME.pattern}=)?\*\*\*"
_SHOWN_QUERY = re.compile(rf"{_PIECE}(?:&{_PIECE})*&\*\*\*[0-9a-f]{{{MARK}}}", re.ASCII)


def place(key: str, *, keep: KeepDirectories, root: str = "") -> str:
    """Relative path of an object (I-21); `root` is the wildcard root, empty for a literal URI.

    >>> place("foo/bar/ds1/a.jpg", keep="suffix", root="foo/bar/")
    'ds1/a.jpg'
    """
    if keep == "full":
        return key
    if keep == "suffix" and root:
        return key[len(root) :] if key.startswith(root) else key
    return key.rpartition("/")[2]


def place_datum(name: str, *, keep: KeepDirectories) -> str:
    """A datum's own name is its path (I-22)."""
    return name.rpartition("/")[2] if keep == "none" else name


def place_url(url: str, *, keep: KeepDirectories) -> str:
    """The last path segment without the query, as it stands (I-25); `full` keeps the path below the host."""
    path = urlsplit(url).path.strip("/")
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if not parts or url.partition("?")[0].endswith("/"):
        parts = [*parts, UNNAMED]
    return "/".join(parts) if keep == "full" else parts[-1]


def rename(path: str, filename: str) -> str:
    """`filename` of the input replaces the base name (I-24)."""
    folder, slash, _ = path.rpartition("/")
    return folder + slash + filename


def public_uri(uri: str) -> str:
    """An input's URI as it may be shown; only web addresses hold credentials."""
    return public_url(uri) if uri.lower().startswith(_WEB) else uri


def public_url(url: str) -> str:
    """The URL as it may be shown: without user, password and fragment, and without the values of its query, any of
    which may be a credential.

    A digest keeps apart URLs whose values differ. What may be shown already stays as it is.

    >>> public_url("https://me:pw@host/a.csv?day=1&token=abc")
    'https://host/a.csv?day=***&token=***&***57f07d58'
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # no number where a password has a character that ends a host
    except ValueError:
        return url.partition("://")[0] + "://(not readable as a URL)"
    location = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=location, query=_shown(parts.query), fragment=""))


def hides_values(uri: str) -> bool:
    """Whether it is a web address that `public_url` has taken the values of the query from."""
    if not uri.lower().startswith(_WEB) or public_url(uri) != uri:
        return False
    return _SHOWN_QUERY.fullmatch(uri.partition("?")[2]) is not None


def _shown(query: str) -> str:
    """The names that look like names, and a digest of all."""
    if not query or _SHOWN_QUERY.fullmatch(query):
        return query
    pairs = [piece.partition("=") for piece in query.split("&")]
    names = [f"{name}=" if equals and _NAME.fullmatch(name) else "" for name, equals, _ in pairs]
    digest = hashlib.sha256(query.encode("utf-8", "surrogatepass")).hexdigest()
    return "&".join(f"{shown}***" for shown in [*names, ""]) + digest[:MARK]


def settle(input_name: str, files: Iterable[JobFile]) -> tuple[list[JobFile], list[str], list[str]]:
    """Files that remain, warnings, and problems. Of two with one path the last one stays (I-23)."""
    by_name: dict[str, JobFile] = {}
    warnings: list[str] = []
    for file in files:
        if file.name in by_name:
            loser = by_name.pop(file.name)
            warnings.append(
                f"input {input_name!r}: {loser.uri} and {file.uri} have the same path {file.name!r}; the last one is used"
            )
        by_name[file.name] = file
    folders = {name[:i] for name in by_name for i, c in enumerate(name) if c == "/"}
    problems = [
        f"input {input_name!r}: {name!r} is both a file and a directory of other files; use keep-directories or filename"
        for name in by_name
        if name in folders
    ]
    return list(by_name.values()), warnings, problems
