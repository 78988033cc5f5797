"""Grants travel sealed: only the process that holds the lease can read them (X25519 sealed boxes).

The agent makes a fresh key pair per lease and publishes the public half, as hex, in the lease. Whoever reads
Redis, its dumps or its append-only file learns no URL, no password and no secret.
"""

from __future__ import annotations

from nacl.encoding import HexEncoder
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from valohai_agent.protocol import Grants

__all__ = [
    "CannotOpen",
    "PrivateKey",
    "new_private_key",
    "open_grants",
    "public_key_of",
    "seal_grants",
]


class CannotOpen(Exception):
    """The entry was sealed for another lease, or is damaged."""


def new_private_key() -> PrivateKey:
    return PrivateKey.generate()


def public_key_of(key: PrivateKey) -> str:
    """What the lease's field `public_key` holds: 64 hex digits."""
    return key.public_key.encode(HexEncoder).decode()


def seal_grants(grants: Grants, public_key: str) -> bytes:
    """One entry's field `g` of the grant stream. Raises ValueError when `public_key` is not a key."""
    try:
        key = PublicKey(public_key.encode(), HexEncoder)
    except Exception as exc:
        raise ValueError("the lease's public key is not 64 hex digits") from exc
    return SealedBox(key).encrypt(grants.model_dump_json().encode())


def open_grants(sealed: bytes, key: PrivateKey) -> Grants:
    """Raises CannotOpen; the caller drops the entry, since it is not for this lease."""
    try:
        return Grants.model_validate_json(SealedBox(key).decrypt(sealed))
    except (CryptoError, ValueError) as exc:
        raise CannotOpen("the entry was not sealed for this lease") from exc
