"""Under which names the content of an input may be kept, and what its source calls it; decides, does nothing (I-33, I-35).

An object may change between the look-up of its version and the download. Only the answer that brought the bytes says
which version they are, so nothing is kept under the name of a version that the answer did not confirm.
"""

from __future__ import annotations

from collections.abc import Sequence

from valohai_agent.protocol import JobFile
from valohai_agent.transfer import Transferred


def looked_up(file: JobFile, names: Sequence[str]) -> str | None:
    """What the source called the content when it was asked, as far as the names tell."""
    for name in names:
        for mark in "#@":
            if name.startswith(file.uri + mark):
                return name[len(file.uri) + 1 :]
    return None


def is_settled(file: JobFile) -> bool:
    """Whether the bytes have been compared with what was expected: a datum never changes, a checksum tells all."""
    return file.datum_id is not None or any(file.checksums.model_dump().values())


def cut_short(file: JobFile, names: Sequence[str], moved: Transferred) -> str | None:
    """What is wrong when the very version that was looked up came with another size; None when nothing is."""
    known = looked_up(file, names)
    if known is None or file.size in (None, moved.size) or not moved.version.confirms(known):
        return None
    return (
        f"{moved.size} bytes came, but this version of it has {file.size}. Something on the way to the store "
        "changes its answers; look at proxies between the worker and the store."
    )


def replaced(file: JobFile, names: Sequence[str], moved: Transferred) -> str | None:
    """What is wrong with a datum without checksums whose source calls it otherwise now; None when nothing is.

    A datum never changes: what is there now is another content, which must not be kept under its names.
    """
    known = looked_up(file, names)
    if file.datum_id is None or known in (None, str(file.size)) or file.checksums.sha256:
        return None
    if not moved.version.contradicts(known):
        return None
    return (
        f"it was replaced in its store since it was adopted: its version is {moved.version.like(known)}, was {known}. "
        "Put the old content back, or adopt what is there now (`valohai-dagster data adopt` with its URL) and use that"
    )


def version_met(file: JobFile, names: Sequence[str], moved: Transferred) -> str | None:
    """What the source called the content that it sent; None when it did not say."""
    known = looked_up(file, names)
    if is_settled(file) and known is not None:
        return known
    return moved.version.like(known if file.cache_key else None)


def names_met(file: JobFile, names: Sequence[str], moved: Transferred) -> tuple[str, ...]:
    """Those names that stand for the content that came, and that of the version that its source called it."""
    if is_settled(file):
        return tuple(names)
    version = version_met(file, names, moved)
    mark = "@" if file.cache_key and looked_up(file, names) is not None else "#"
    return () if version is None else (f"{file.uri}{mark}{version}",)


def change(file: JobFile, names: Sequence[str], moved: Transferred) -> str | None:
    """How a file differs from what was found when the execution was created, in words; None when it does not (I-32)."""
    if is_settled(file):
        return None
    words = []
    known, met = looked_up(file, names), version_met(file, names, moved)
    if file.cache_key and None not in (known, met) and known != met:
        words.append(f"its version is {met}, was {known}")
    if file.size is not None and file.size != moved.size:
        words.append(f"it has {moved.size} bytes, had {file.size}")
    if not words:
        return None
    return f"has changed since the execution was created: {', '.join(words)}. The job gets it as it is now."
