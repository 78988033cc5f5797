"""Uploads in parts as the records keep them: encrypted, since a store's name for one may be a credential."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from valohai_dagster.data.secrets import SecretKey
from valohai_dagster.stores.base import PartedUpload


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An upload in parts of `size` bytes that a store has begun."""

    upload: PartedUpload
    size: int

    @property
    def number(self) -> int:
        """How many parts it has; a resumable session is one part, whatever its size."""
        if self.upload.style == "session":
            return 1
        return max(1, -(-self.size // self.upload.part_bytes))


def seal_parts(key: SecretKey, begun: Begun) -> bytes:
    return key.encrypt_json({**asdict(begun.upload), "size": begun.size})


def open_parts(key: SecretKey, sealed: bytes) -> Begun:
    content = key.decrypt_json(sealed)
    size = content.pop("size")
    return Begun(upload=PartedUpload(**content), size=size)
