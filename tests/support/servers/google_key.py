"""A service account's key file of the tests' own: signs like a real one, and no one trusts it."""

from __future__ import annotations

import json
from pathlib import Path

EMAIL = "tester@tests.iam.gserviceaccount.com"


def write_key(path: Path, *, token_uri: str) -> Path:
    """The file; access tokens come from `token_uri`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    content = {
        "type": "service_account",
        "project_id": "tests",
        "private_key_id": "of-the-tests",
        "private_key": pem.decode(),
        "client_email": EMAIL,
        "client_id": "1",
        "token_uri": token_uri,
        "universe_domain": "tests.invalid",  # keeps the library from asking Google about the account
    }
    path.write_text(json.dumps(content))
    return path
