"""Google's description of the Compute API, as google-api-python-client carries it: which requests and answers there are.

Requests are matched to its methods and checked against it (paths, query, body, types, enumerations); so are the answers
of the stand-in.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": int,
}


class Unacceptable(Exception):
    """A request that the description does not have, or that it has otherwise."""


@dataclass(frozen=True)
class Call:
    """A request that fits: `method` as in `instanceTemplates.insert`, `place` from its path."""

    method: str
    place: Mapping[str, str]
    query: Mapping[str, str]
    body: Mapping[str, Any]


class Description:
    """The published methods and schemas of the API."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas = document["schemas"]
        self._common = document["parameters"]
        self._routes: dict[tuple[str, int], list[tuple[re.Pattern[str], str, Any]]] = {}
        self._responses: dict[str, Any] = {}
        for resource, content in document["resources"].items():
            for verb, method in content.get("methods", {}).items():
                self._add(f"{resource}.{verb}", document["servicePath"], method)

    def _add(self, name: str, prefix: str, method: Any) -> None:
        path = "/" + prefix + method.get("flatPath", method["path"])
        pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))
        key = (method["httpMethod"], path.count("/"))
        self._routes.setdefault(key, []).append((pattern, name, method))
        self._responses[name] = method.get("response")

    def read(self, verb: str, address: str, body: bytes) -> Call:
        """Raises Unacceptable."""
        url = urlsplit(address)
        for pattern, name, method in self._routes.get((verb, url.path.count("/")), []):
            match = pattern.fullmatch(url.path)
            if match:
                place = {key: unquote(value) for key, value in match.groupdict().items()}
                query = {key: values[-1] for key, values in parse_qs(url.query).items()}
                self._check_parameters(method, place, query)
                return Call(name, place, query, self._body(method, body))
        raise Unacceptable(f"there is no method {verb} {url.path}")

    def _check_parameters(
        self, method: Any, place: Mapping[str, str], query: Mapping[str, str]
    ) -> None:
        known = method.get("parameters", {})
        for key in query:
            if key not in known and key not in self._common and not key.startswith("$"):
                raise Unacceptable(f"unknown parameter {key!r}")
        for key, about in known.items():
            value = place.get(key, query.get(key))
            if value is None and about.get("required"):
                raise Unacceptable(f"the parameter {key!r} is missing")
            pattern = about.get("pattern")
            if value is not None and pattern and not re.fullmatch(pattern, value):
                raise Unacceptable(f"Invalid value for field {key!r}: {value!r}")

    def _body(self, method: Any, body: bytes) -> Mapping[str, Any]:
        if not body:
            return {}
        if "request" not in method:
            raise Unacceptable("this method takes no body")
        content = json.loads(body)
        self._check(method["request"], content, "body")
        return content

    def check_answer(self, method: str, answer: Any) -> None:
        """Raises AssertionError: the stand-in itself is wrong."""
        try:
            self._check(self._responses[method], answer, method)
        except Unacceptable as error:
            raise AssertionError(str(error)) from None

    def _check(self, schema: Mapping[str, Any], value: Any, where: str) -> None:
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"]]
        kind = _TYPES.get(schema.get("type", ""))
        strange = isinstance(value, bool) and schema.get("type") in ("integer", "number")
        if kind and (strange or not isinstance(value, kind)):
            raise Unacceptable(f"{where}: {schema['type']} expected")
        if "enum" in schema and value not in schema["enum"]:
            raise Unacceptable(f"{where}: {value!r} is none of {schema['enum']}")
        if isinstance(value, Mapping):
            self._check_fields(schema, value, where)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for number, item in enumerate(value):
                self._check(schema["items"], item, f"{where}[{number}]")

    def _check_fields(
        self, schema: Mapping[str, Any], value: Mapping[str, Any], where: str
    ) -> None:
        for key, item in value.items():
            field = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if field is None:
                raise Unacceptable(f"{where}: unknown field {key!r}")
            self._check(field, item, f"{where}.{key}")


@functools.cache
def compute() -> Description:
    """Compute Engine, version 1."""
    folder = importlib.resources.files("googleapiclient") / "discovery_cache" / "documents"
    return Description(json.loads((folder / "compute.v1.json").read_text()))
