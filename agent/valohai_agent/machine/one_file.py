"""`__main__` of the agent as one file: unpacks once what this Python on this machine needs, and goes on there.

The file is a zip. `release.json` says what it is; `index.json` names every file of the agent and its dependencies, those
that are the same everywhere and those of one Python on one processor; `blobs/` holds each content once. Nothing here
may import what is not in the standard library, before it has unpacked the rest.

What is unpacked lies beside the file, else in the user's cache. It is used only if nobody else could have written it.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import zipfile

OLDEST = (3, 10)
OPEN_TO_READ = 0o755  # root unpacks, the agents' user reads
KEPT = 3  # unpacked releases; an older agent may still run from an older one


def main() -> None:
    file = os.path.abspath(sys.path[0])
    if sys.version_info < OLDEST:
        raise SystemExit(
            _refusal(f"needs Python 3.10 or newer; this is {platform.python_version()}")
        )
    with zipfile.ZipFile(file) as archive:
        release = json.loads(archive.read("release.json").decode())
        tree = _tree(archive, release)
    os.environ["VALOHAI_AGENT_FILE"] = file
    os.environ["PYTHONPATH"] = tree  # for the agent's own helper processes
    sys.path[0] = tree
    importlib.import_module("valohai_agent.cli").main()


def tag() -> str:
    """This Python and this processor, as the index calls them."""
    return f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}"


def _tree(archive: zipfile.ZipFile, release: dict[str, str]) -> str:
    name = f"{release['version']}-{release['content'][:12]}-{tag()}"
    places = _places(archive.filename or "")
    for place in places:
        tree = os.path.join(place, name)
        if _trusted(tree):
            return tree
    trouble = OSError("nowhere to")
    for place in places:
        tree = os.path.join(place, name)
        try:
            _unpack(archive, place, tree)
        except OSError as error:
            trouble = error
            continue
        if _trusted(tree):
            return tree
        trouble = OSError(f"{tree} belongs to somebody else")
    raise SystemExit(
        _refusal(
            f"cannot unpack itself into {' or '.join(places)}: {trouble}; free some space there"
        )
    )


def _places(file: str) -> list[str]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [
        os.path.join(os.path.dirname(file), "unpacked"),
        os.path.join(cache, "valohai-agent", "unpacked"),
    ]


def _trusted(tree: str) -> bool:
    """Of root or of this user, and writable by nobody else."""
    try:
        for path in (os.path.dirname(tree), tree):
            seen = os.lstat(path)
            if not stat.S_ISDIR(seen.st_mode) or seen.st_mode & 0o022:
                return False
            if seen.st_uid not in (0, os.geteuid()):
                return False
    except OSError:
        return False
    return True


def _unpack(archive: zipfile.ZipFile, place: str, tree: str) -> None:
    """Complete beside it, then renamed: of two processes one wins, and neither sees half of it."""
    index = json.loads(archive.read("index.json").decode())
    mine = index["trees"].get(tag())
    if mine is None or not sys.platform.startswith("linux") or not platform.libc_ver()[0]:
        known = ", ".join(sorted(index["trees"]))
        raise SystemExit(
            _refusal(f"is made for Linux with glibc and these: {known}; this is {tag()}")
        )
    if not os.path.isdir(place):
        os.makedirs(place, 0o755)
        os.chmod(place, OPEN_TO_READ)
    half = tempfile.mkdtemp(prefix=".half-", dir=place)
    try:
        for path, blob in list(index["common"].items()) + list(mine.items()):
            target = os.path.join(half, *path.split("/"))
            _make_directories(os.path.dirname(target))
            with open(target, "wb") as out:
                out.write(archive.read("blobs/" + blob))
            os.chmod(target, 0o644)
        os.chmod(half, OPEN_TO_READ)
        if not os.path.isdir(tree):
            os.rename(half, tree)
    except OSError:
        if not _trusted(tree):  # else another process was quicker
            raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    _remove_old(place, tree)


def _make_directories(path: str) -> None:
    if not os.path.isdir(path):
        _make_directories(os.path.dirname(path))
        os.mkdir(path)
        os.chmod(path, OPEN_TO_READ)


def _remove_old(place: str, tree: str) -> None:
    trees = [os.path.join(place, name) for name in os.listdir(place) if not name.startswith(".")]
    trees.sort(key=os.path.getmtime, reverse=True)
    for old in trees[KEPT:]:
        if old != tree:
            shutil.rmtree(old, ignore_errors=True)


def _refusal(why: str) -> str:
    return f"The agent file {sys.argv[0]} {why}."


if __name__ == "__main__":
    main()
