"""Where input files lie below `/valohai/inputs/<input>/` (I-20 to I-25). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from valohai_agent.protocol import JobFile

KeepDirectories = Literal["none", "suffix", "full"]
UNNAMED = "download"  # a URL without a usable last segment
_SECRET_QUERY = {
    "access_token",
    "api_key",
    "apikey",
    "sig",
    "signature",
    "token",
    "x-amz-credential",
    "x-amz-security-token",
    "x-amz-signature",
    "x-goog-credential",
    "x-goog-signature",
}


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


def public_url(url: str) -> str:
    """The URL as it may be shown: without user and password, signatures and tokens in the query blanked."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0] + "://(not readable as a URL)"
    location = parts.netloc.rpartition("@")[2]
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    if any(name.lower() in _SECRET_QUERY for name, _ in pairs):
        shown = [(n, "***" if n.lower() in _SECRET_QUERY else v) for n, v in pairs]
        parts = parts._replace(query=urlencode(shown, safe="*", quote_via=quote))
    return urlunsplit(parts._replace(netloc=location))


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
