"""Podman's Docker-compatible service on a socket of its own, with storage of its own."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from tests.support.ports import wait_for

IMAGE = "localhost/vt-podman:latest"
# runc and these limits work also where the host is a container with few rights.
_CONFIG = """
[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
"""


def missing_programs() -> list[str]:
    found = [name for name in ("podman", "runc", "busybox") if not shutil.which(name)]
    init = any(
        Path(path).exists() for path in ("/usr/libexec/podman/catatonit", "/usr/bin/catatonit")
    )
    return found if init else [*found, "catatonit"]


class PodmanService:
    """Serves until `stop`; has the image `IMAGE`, a busybox with `sh`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.host = f"unix://{directory / 'p.sock'}"
        (directory / "containers.conf").write_text(_CONFIG)
        with (directory / "service.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command("system", "service", "--time=0", self.host),
                env=self._environment(),
                stdout=log,
                stderr=log,
            )
        wait_for((directory / "p.sock").exists, seconds=20, what="podman's socket")
        subprocess.run(
            self._command("import", "-", IMAGE),
            input=busybox_root(),
            env=self._environment(),
            check=True,
            capture_output=True,
        )

    def _command(self, *arguments: str) -> list[str]:
        root, run = self._directory / "root", self._directory / "run"
        return ["podman", "--root", str(root), "--runroot", str(run), *arguments]

    def _environment(self) -> dict[str, str]:
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        conf = str(self._directory / "containers.conf")
        return {"PATH": path, "HOME": str(self._directory), "CONTAINERS_CONF": conf}

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        for mount in ("root/overlay", "root"):
            subprocess.run(
                ["umount", "-l", str(self._directory / mount)], check=False, capture_output=True
            )


def busybox_root() -> bytes:
    """The tree of an image: busybox and the commands that the tests type."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tree:
        tree.add(str(shutil.which("busybox")), "bin/busybox")
        for name in ("sh", "cat", "echo", "id", "kill", "sleep", "seq", "chmod", "mkdir", "rm"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tree.addfile(link)
    return content.getvalue()
