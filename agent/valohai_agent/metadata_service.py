"""The metadata service of the cloud that a machine runs in: small questions over plain HTTP to a link-local address.

Which cloud it is can be seen without any network, in what the firmware says of itself. Answers are never logged.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

TIMEOUT_SECONDS = 2.0
MAX_ANSWER_BYTES = 1024 * 1024
_FIRMWARE, _HYPERVISOR = Path("/sys/class/dmi/id"), Path("/sys/hypervisor/uuid")
_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"  # of all its machines


class Cloud(str, Enum):
    """Clouds that announce to a machine that it goes away."""

    aws = "aws"
    gcp = "gcp"
    azure = "azure"


BASE_URL = "http://169.254.169.254"  # of all three


def cloud_of_host(firmware: Path = _FIRMWARE, hypervisor: Path = _HYPERVISOR) -> Cloud | None:
    """What the firmware tells; None on any other machine, and in containers that cannot see it. Older EC2 machines
    (such as p3 and g3) name only their hypervisor, Xen, as one of Amazon's."""
    if _text(firmware / "chassis_asset_tag") == _AZURE_ASSET_TAG:
        return Cloud.azure
    names = [_text(firmware / name) for name in ("sys_vendor", "product_name", "bios_vendor")]
    xen = "amazon" in _text(firmware / "bios_version") or _text(hypervisor).startswith("ec2")
    if xen or any(name.startswith("Amazon EC2") for name in names):
        return Cloud.aws
    return Cloud.gcp if any(name.startswith("Google") for name in names) else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


class Unanswered(OSError):
    """The metadata service did not answer, or with an error."""


class MetadataService:
    """One base URL. No proxy is asked: the service is on the machine's own link."""

    def __init__(self, base_url: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout = timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> str | None:
        """The answer's text; None for 404. Raises `Unanswered`."""
        return self.ask("GET", path, headers)

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> str | None:
        url = f"{self._base_url}{path}"
        request = urllib.request.Request(url, body, dict(headers or {}), method=method)  # noqa: S310 - of the operator
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                return answer.read(MAX_ANSWER_BYTES).decode("utf-8", "replace").strip()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == http.HTTPStatus.NOT_FOUND:
                    return None
                raise Unanswered(f"{method} {path}: HTTP {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(f"{method} {path}: {error}") from None
