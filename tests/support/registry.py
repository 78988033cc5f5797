"""A private image registry on loopback (Debian's docker-registry) with one user."""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from tests.support.ports import free_port, wait_for

if TYPE_CHECKING:
    from docker import DockerClient

LAYER_BYTES = 8_000_000
_DOCKERFILE = """
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
COPY ballast /ballast
"""


def missing_programs() -> list[str]:
    return [name for name in ("docker-registry", "htpasswd", "busybox") if not shutil.which(name)]


class Registry:
    """Serves until `stop`; its user is `puller` with the password `let-me-in`."""

    username, password = "puller", "let-me-in"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.address = f"127.0.0.1:{free_port()}"
        self._passwords()
        (directory / "config.yml").write_text(self._config())
        with (directory / "registry.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(directory / "config.yml")], stdout=log, stderr=log
            )
        wait_for(self._answers, what=f"the registry on {self.address}")

    def _passwords(self) -> None:
        command = ["htpasswd", "-Bbn", self.username, self.password]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (self._directory / "htpasswd").write_text(done.stdout)

    def _config(self) -> str:
        return textwrap.dedent(f"""
            version: 0.1
            storage: {{filesystem: {{rootdirectory: {self._directory}/data}}}}
            http: {{addr: {self.address}}}
            auth: {{htpasswd: {{realm: test, path: {self._directory}/htpasswd}}}}
        """)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._directory / "registry.log").read_text()
        try:
            return httpx.get(f"http://{self.address}/v2/").status_code == 401
        except httpx.HTTPError:
            return False

    def push(self, client: DockerClient, name: str) -> str:
        """Builds a small image, pushes it as `name`, and forgets it here; its full name."""
        image = f"{self.address}/{name}"
        context = self._directory / "context"
        context.mkdir(exist_ok=True)
        shutil.copy(str(shutil.which("busybox")), context / "busybox")
        (context / "ballast").write_bytes(os.urandom(LAYER_BYTES))
        (context / "Dockerfile").write_text(_DOCKERFILE)
        client.images.build(path=str(context), tag=image, rm=True, forcerm=True)
        login = {"username": self.username, "password": self.password}
        for event in client.api.push(image, stream=True, decode=True, auth_config=login):
            assert "error" not in event, event
        client.images.remove(image, force=True)
        return image

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
