"""Tells metadata lines from plain output (M-10 to M-12)."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_METADATA_BYTES = 1024 * 1024  # a longer line is plain output
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_DECODER = json.JSONDecoder(
    parse_constant=lambda name: name, parse_float=lambda text: _finite(text)
)


def parse_metadata(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a metadata line, or None for plain output.

    ANSI codes and everything up to the last carriage return are ignored, as is surrounding white
    space. The first object counts; what follows it must be nothing or another object (M-11). NaN and
    infinities become text, since charts leave text out (M-12). An empty object is no metadata.
    """
    if b"{" not in line or len(line) > MAX_METADATA_BYTES:
        return None
    text = line.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]
    text = _ANSI.sub("", text).strip()
    if not text.startswith("{"):
        return None
    event = parse_object_prefix(text)
    return event or None


def parse_object_prefix(text: str) -> dict[str, Any] | None:
    """The object that a text begins with, if nothing or another object follows."""
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    rest = text[end:].lstrip()
    if not isinstance(value, dict) or (rest and not rest.startswith("{")):
        return None
    return _encodable(value, text)


def parse_object(text: str) -> dict[str, Any] | None:
    """The object that is all of a text, as sidecars have it; None when it is anything else."""
    try:
        value, end = _DECODER.raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or text.lstrip()[end:].strip():
        return None
    return _encodable(value, text)


def _finite(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _encodable(value: dict[str, Any], text: str) -> dict[str, Any]:
    """Replaces lone surrogates (`\\ud800` in JSON), which no UTF-8 message can carry."""
    if "\\ud" not in text.lower():
        return value
    dumped = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(dumped)
