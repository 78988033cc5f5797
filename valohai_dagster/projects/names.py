"""Legal Dagster names for names that people chose.

Dagster takes `[A-Za-z0-9_]+` without a few reserved words; valohai.yaml takes anything. The mapping depends on
the names alone, not on their order, so that adding a step renames no other asset.
"""

from __future__ import annotations

import hashlib
import keyword
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

_ILLEGAL = re.compile(r"[^A-Za-z0-9_]+")
_RESERVED = frozenset(
    [
        *keyword.kwlist,
        *("context", "conf", "config", "meta", "arg_dict", "dict", "input_arg_dict"),
        *("output_arg_dict", "int", "str", "float", "bool", "input", "output", "type"),
    ]
)
MAX_NAME = 200  # leaves room for prefixes in run tags and file names


def is_legal(name: str) -> bool:
    return (
        bool(name) and not _ILLEGAL.search(name) and name not in _RESERVED and len(name) <= MAX_NAME
    )


def legal_name(name: str, *, fallback: str = "step") -> str:
    """Closest legal name: accents dropped, other signs become one underscore; names may collide."""
    if is_legal(name):
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    base = _ILLEGAL.sub("_", plain).strip("_")[:MAX_NAME]
    if not base:
        return f"{fallback}_{_mark(name)}"
    return f"{base}_" if base in _RESERVED else base


def legal_names(names: Iterable[str], *, fallback: str = "step") -> dict[str, str]:
    """Original -> legal, all different. A legal name keeps itself; others that collide get a mark of their original."""
    originals = list(dict.fromkeys(names))
    wanted = {name: legal_name(name, fallback=fallback) for name in originals}
    count = Counter(wanted.values())
    return {
        name: legal
        if name == legal or count[legal] == 1
        else f"{legal[: MAX_NAME - 9]}_{_mark(name)}"
        for name, legal in wanted.items()
    }


def _mark(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
