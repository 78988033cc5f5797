"""Checks bodies of the Azure API against the models of azure-mgmt-compute, which Microsoft generates from its own
description: unknown fields, enumerations. No package carries that description itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from azure.mgmt.compute import models

_NAMED = re.compile(r"_models\.(\w+)")
_OPEN = {"VirtualMachineSizeTypes"}  # has a few of them only, and says so


class Unacceptable(Exception):
    """A body that the models do not have."""


def check(kind: str, body: Mapping[str, Any]) -> None:
    """Raises Unacceptable."""
    _check(getattr(models, kind)(dict(body)), kind)


def _check(value: Any, where: str) -> None:
    if isinstance(value, list):
        for number, one in enumerate(value):
            _check(one, f"{where}[{number}]")
    elif hasattr(value, "_attr_to_rest_field"):
        fields = {field._rest_name: name for name, field in value._attr_to_rest_field.items()}
        for key in value:
            if key not in fields:
                raise Unacceptable(f"Could not find member {key!r} on object of type {where!r}")
            found = getattr(value, fields[key])
            _check_words(type(value), fields[key], found, f"{where}.{key}")
            _check(found, f"{where}.{key}")
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _check(one, f"{where}.{key}")


def _check_words(owner: type, name: str, found: Any, where: str) -> None:
    """A word of an enumeration that is none of it stays a plain string."""
    for cls in owner.__mro__:
        named = _NAMED.search(str(inspect.get_annotations(cls).get(name, "")))
        kind = getattr(models, named[1], None) if named and named[1] not in _OPEN else None
        if isinstance(kind, type) and issubclass(kind, Enum) and found not in set(kind):
            raise Unacceptable(f"{where}: {found!r} is no {kind.__name__}")
