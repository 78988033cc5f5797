"""Builds the one image of the Docker tests from Debian packages, once per recipe.

debootstrap makes a Debian tree with Python, numpy, scikit-learn and matplotlib; valohai-utils comes as wheels for
that tree's Python; the result is imported under a name that carries the recipe's hash, so that a changed recipe
builds anew and an unchanged one is found in milliseconds. Building takes one to two minutes and needs root and
a Debian mirror (`DEBIAN_MIRROR` names another one).

    python -m tests.images.build        # prints the image's name
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import docker

SUITE = "bookworm"
PYTHON = "3.11"  # of that suite
PACKAGES = (
    "ca-certificates",
    "procps",
    "python-is-python3",
    "python3",
    "python3-matplotlib",
    "python3-pip",
    "python3-sklearn",
    "python3-venv",
)
WHEELS = ("valohai-utils==0.8.0",)
REPOSITORY = "valohai-dagster-test"
RECIPE_VERSION = "1"  # raise it when the code below changes what is built
_USELESS = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/fonts-mathjax",
    "usr/share/javascript",
)


class ImageBuildError(Exception):
    """This machine cannot build the image; says why."""


def image_name() -> str:
    recipe = "\n".join((RECIPE_VERSION, SUITE, *PACKAGES, *WHEELS))
    return f"{REPOSITORY}:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def ensure(client: docker.DockerClient) -> str:
    """Name of the image, built first when the daemon does not have it. Safe for parallel test processes."""
    import docker.errors

    name = image_name()
    with _only_one():
        try:
            client.images.get(name)
        except docker.errors.ImageNotFound:
            _build(client, name)
    return name


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    with open(Path(tempfile.gettempdir()) / f"{REPOSITORY}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(client: docker.DockerClient, name: str) -> None:
    for tool in ("debootstrap", "tar"):
        if shutil.which(tool) is None:
            raise ImageBuildError(
                f"image {name} is missing and `{tool}` is not installed to build it"
            )
    if os.geteuid() != 0:
        raise ImageBuildError(
            f"image {name} is missing and building it needs root: sudo python -m tests.images.build"
        )
    with tempfile.TemporaryDirectory(prefix="vhimage-") as work:
        root = Path(work) / "root"
        mirror = os.environ.get(
            "DEBIAN_MIRROR", ""
        ).split()  # without one, debootstrap knows its own
        include = "--include=" + ",".join(PACKAGES)
        _run("debootstrap", "--variant=minbase", include, SUITE, str(root), *mirror)
        _add_wheels(root)
        _trim(root)
        _import(client, root, name)


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = (done.stdout + done.stderr)[-1500:]
        raise ImageBuildError(f"`{' '.join(command)}` ended with {done.returncode}:\n{tail}")


def _add_wheels(root: Path) -> None:
    """Wheels for the image's Python, whatever Python runs this."""
    target = root / "usr/local/lib" / f"python{PYTHON}" / "dist-packages"
    options = ["--target", str(target), "--python-version", PYTHON, "--only-binary", ":all:"]
    if shutil.which("uv"):
        _run("uv", "pip", "install", "-q", *options, *WHEELS)
    else:
        _run(sys.executable, "-m", "pip", "install", "-q", *options, *WHEELS)


def _trim(root: Path) -> None:
    for path in _USELESS:
        shutil.rmtree(root / path, ignore_errors=True)
    for cache in root.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()  # PEP 668: steps of projects may call pip as they do in python images


def _import(client: docker.DockerClient, root: Path, name: str) -> None:
    repository, tag = name.split(":")
    archive = root.parent / "root.tar"
    _run("tar", "-C", str(root), "-cf", str(archive), ".")
    answer = client.api.import_image_from_file(
        str(archive), repository=repository, tag=tag, changes=['CMD ["python3"]']
    )
    if "errorDetail" in str(answer):
        raise ImageBuildError(f"the daemon did not import {name}: {answer}")


def main() -> None:
    import docker

    try:
        print(ensure(docker.from_env(timeout=600)))
    except ImageBuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
