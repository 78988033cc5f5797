"""Checks what a launch asks for in `remote_debug` (K-60); pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from valohai_agent.protocol import RemoteDebug

LOWEST_PORT, HIGHEST_PORT = 1024, 65535
KINDS = ("ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-")


def remote_debug_of(given: Mapping[str, Any] | None, problems: list[str]) -> RemoteDebug | None:
    """None when it is not asked for, or wrong: then `problems` says why, without repeating a private key."""
    if given is None:
        return None
    wrong = [*_port_problems(given.get("port")), *_key_problems(given.get("key"))]
    problems.extend(f"remote_debug: {problem}" for problem in wrong)
    if wrong:
        return None
    return RemoteDebug(port=given["port"], key=str(given["key"]).strip())


def _port_problems(port: Any) -> list[str]:
    if isinstance(port, int) and not isinstance(port, bool) and LOWEST_PORT <= port <= HIGHEST_PORT:
        return []
    return [f"port {port!r} is not a number from {LOWEST_PORT} to {HIGHEST_PORT}"]


def _key_problems(key: Any) -> list[str]:
    text = str(key or "").strip()
    if "PRIVATE KEY" in text:
        return ["key is a private key; give the public one, the content of the `.pub` file"]
    words = text.split()
    if "\n" in text or len(words) < 2 or not words[0].startswith(KINDS) or not _is_base64(words[1]):
        return ["key is no public key in one line, such as `ssh-ed25519 AAAA... you@host`"]
    return []


def _is_base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return False
