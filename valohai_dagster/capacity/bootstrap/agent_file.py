"""The agent as one file: its own code and all that it needs, for several Pythons and processors.

    python -m valohai_dagster.capacity.bootstrap.agent_file dist/valohai-agent.pyz        # `make agent`

`agent-requirements.txt` pins every dependency by hash, so the same sources give the same file (with the same zlib).
Some dependencies are compiled (pydantic-core, PyNaCl, cffi, cryptography): they are in it for each of `TAGS`, each
content once. How such a file starts is told in `valohai_agent/machine/one_file.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement

from valohai_agent.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from valohai_agent.version import __version__ as agent_version
from valohai_dagster.errors import ConfigurationError, RefusedError

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PROCESSORS = ("x86_64", "aarch64")
TAGS = tuple(f"cp{python.replace('.', '')}-{cpu}" for python in PYTHONS for cpu in PROCESSORS)
REQUIREMENTS = "agent-requirements.txt"
SHEBANG = b"#!/usr/bin/env python3\n"
_MOMENT = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_NOT_NEEDED = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json")
_FASTER_ONLY = ("yaml/", "charset_normalizer/")  # compiled parts that are not needed
Tree = dict[str, bytes]  # content by path
Install = Callable[[str, Path], None]


@dataclass(frozen=True, kw_only=True)
class AgentFileFacts:
    """What a file says of itself, with what it is."""

    version: str
    protocol: int
    protocol_min: int
    platforms: tuple[str, ...]
    sha256: str
    size: int


def build(
    target: Path, *, tags: Sequence[str] = TAGS, install: Install | None = None
) -> AgentFileFacts:
    """Makes the file; `install` puts the dependencies for a tag into a directory. Raises ConfigurationError when the dependencies cannot be had."""
    own = {f"valohai_agent/{path}": content for path, content in _agent_sources()}
    trees: dict[str, Tree] = {}
    with tempfile.TemporaryDirectory(prefix="valohai-agent-") as work:
        for tag in tags:
            folder = Path(work) / tag
            folder.mkdir()
            (install or install_dependencies)(tag, folder)
            trees[tag] = {**dict(_files(folder)), **own}
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.half")
    _write(half, trees)
    half.chmod(0o755)
    half.replace(target)
    return describe(target)


def describe(file: Path) -> AgentFileFacts:
    """Raises RefusedError when it is no agent file."""
    try:
        with zipfile.ZipFile(file) as archive:
            facts: Mapping[str, Any] = json.loads(archive.read("release.json"))
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while chunk := content.read(1024 * 1024):
                digest.update(chunk)
        return AgentFileFacts(
            version=str(facts["version"]),
            protocol=int(facts["protocol"]),
            protocol_min=int(facts["protocol_min"]),
            platforms=tuple(facts["platforms"]),
            sha256=digest.hexdigest(),
            size=file.stat().st_size,
        )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise RefusedError(
            f"{file} is no agent file ({type(error).__name__}: {error}); make one with `valohai-dagster agents build`"
        ) from error


# -- what goes in ----------------------------------------------------------------------------------------------------


def _agent_sources() -> Iterator[tuple[str, bytes]]:
    root = resources.files("valohai_agent")
    assert isinstance(root, Path)
    return _files(root)


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        useless = (
            "__pycache__" in name.parts
            or name.parts[0] in ("bin", ".lock")
            or path.suffix in (".pyc", ".pyi")
            or (path.suffix == ".so" and name.as_posix().startswith(_FASTER_ONLY))
            or (name.parts[0].endswith(".dist-info") and path.name in _NOT_NEEDED)
        )
        if path.is_file() and not useless:
            yield name.as_posix(), path.read_bytes()


def install_dependencies(tag: str, folder: Path) -> None:
    """The pinned dependencies for another Python and processor than this one, wheels only."""
    digits, _, cpu = tag.removeprefix("cp").partition("-")
    python = f"{digits[0]}.{digits[1:]}"
    wanted = folder.with_suffix(".txt")
    wanted.write_text(requirements_for(python, cpu))
    common = ["--target", str(folder), "--python-version", python, "--no-deps", "--require-hashes"]
    common += ["--only-binary", ":all:", "-r", str(wanted)]
    if uv := shutil.which("uv"):
        command = [uv, "pip", "install", "-q", "--python-platform", f"{cpu}-manylinux_2_28"]
    else:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-compile"]
        command += ["--implementation", "cp", "--disable-pip-version-check"]
        for level in ("2014", "_2_28", "_2_17"):
            command += ["--platform", f"manylinux{level}_{cpu}"]
    done = subprocess.run([*command, *common], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(
            f"the dependencies of the agent for {tag} cannot be fetched: {(done.stderr or done.stdout).strip()[-600:]}. "
            "It needs uv or pip, and the package index that they use"
        )


def requirements_for(python: str, cpu: str) -> str:
    """The lines of the lock whose markers hold on CPython `python` on Linux, without the markers."""
    text = resources.files("valohai_dagster.capacity.bootstrap").joinpath(REQUIREMENTS).read_text()
    environment: dict[str, Any] = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": cpu,
    }
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        stated, *hashes = line.split(" --hash=")
        try:
            wanted = Requirement(stated.strip())
        except InvalidRequirement:  # a comment
            continue
        if wanted.marker is None or wanted.marker.evaluate(environment):
            pinned = f"{wanted.name}{wanted.specifier}"
            lines.append(" ".join([pinned, *(f"--hash={one.strip()}" for one in hashes)]))
    return "\n".join(lines) + "\n"


# -- the file --------------------------------------------------------------------------------------------------------


def _write(target: Path, trees: Mapping[str, Tree]) -> None:
    """Every content once; what all trees have alike is named once."""
    blobs: Tree = {}
    named = {
        tag: {path: _blob(blobs, content) for path, content in sorted(tree.items())}
        for tag, tree in trees.items()
    }
    first = next(iter(named.values()))
    common = {
        path: blob
        for path, blob in first.items()
        if all(tree.get(path) == blob for tree in named.values())
    }
    rest = {
        tag: {path: blob for path, blob in tree.items() if path not in common}
        for tag, tree in named.items()
    }
    index = json.dumps({"common": common, "trees": rest}, sort_keys=True).encode()
    release = {
        "version": agent_version,
        "protocol": PROTOCOL_VERSION,
        "protocol_min": MIN_PROTOCOL_VERSION,
        "platforms": sorted(trees),
        "content": hashlib.sha256(index).hexdigest(),
    }
    start = resources.files("valohai_agent.machine").joinpath("one_file.py").read_bytes()
    entries: list[tuple[str, bytes]] = [
        ("__main__.py", start),
        ("index.json", index),
        ("release.json", json.dumps(release, sort_keys=True).encode()),
        *((f"blobs/{name}", content) for name, content in sorted(blobs.items())),
    ]
    with target.open("wb") as out:
        out.write(SHEBANG)
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, content in entries:
                entry = zipfile.ZipInfo(name, _MOMENT)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)


def _blob(blobs: Tree, content: bytes) -> str:
    name = hashlib.sha256(content).hexdigest()
    blobs[name] = content
    return name


def main(arguments: Iterable[str]) -> None:
    target = Path(next(iter(arguments), "dist/valohai-agent.pyz"))
    facts = build(target)
    print(f"{target}: agent {facts.version}, {facts.size / 1e6:.1f} MB, sha256 {facts.sha256}")
    print(f"for {', '.join(facts.platforms)}")


if __name__ == "__main__":
    main(sys.argv[1:])
