"""What the steps of a project read from outside: the default URIs of their inputs, as nodes of the asset graph.

Pure. A source is one URI or wildcard; steps that name the same one share it. Its name is made of the URI alone, so it
stays the same whatever else the project reads, and holds no user, password, signature or token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from valohai_dagster.data.aliases import is_datum_id
from valohai_dagster.data.placement import public_uri
from valohai_dagster.projects.edges import StepEdge
from valohai_dagster.projects.names import legal_name

EXTERNAL = "external"  # the second part of every key, after the project's
OUTSIDE = ("http", "https", "s3", "gs", "azure", "swift", "store", "file")
NAMED = ("datum", "dataset", "model")  # in the records; what an alias names may change
MARK = 8  # characters of the digest that tells apart what is spelled alike

KeyPath = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SourceUse:
    """An input of a step that a source feeds, unless a launch or an edge brings something else."""

    step: str
    input: str
    asked: str  # the URI as written, as it may be shown


@dataclass(frozen=True, kw_only=True)
class ExternalSource:
    """One thing outside that steps read by default."""

    uri: str  # as it may be shown; what a trailing `/` or `/*` means is spelled out
    read: str  # the same as it is opened: may hold credentials, so never show it
    path: KeyPath  # of its asset key
    environment: str | None  # of the first step that uses it: whose machines read it
    uses: tuple[SourceUse, ...]
    keeps_directories: bool = (
        False  # whether an input that it feeds does, so that equal names may be several files
    )

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for any number of files."""
        return not _is_web(self.uri) and ("*" in self.uri or self.uri.startswith("dataset://"))


def external_sources(
    project_name: str, steps: Mapping[str, Any], edges: Iterable[StepEdge]
) -> list[ExternalSource]:
    """Sources of all steps (`StepDefinition` by name) in the order of the file; `project_name` begins their keys.

    Left out: defaults that an edge replaces, URIs with parameters in them, and datums by id, which never change.
    """
    replaced = {
        (edge.target_step, edge.target_key)
        for edge in edges
        if edge.target_type == "input" and edge.merge_mode == "replace"
    }
    found: dict[str, ExternalSource] = {}
    for name, step in steps.items():
        for declared in step.step.inputs.values():
            if (name, declared.name) in replaced:
                continue
            for uri in _defaults(declared):
                source = _source(uri, step, declared)
                known = found.get(source.uri)
                if known is not None:
                    keeps = known.keeps_directories or source.keeps_directories
                    uses = (*known.uses, *source.uses)
                    source = replace(known, uses=uses, keeps_directories=keeps)
                found[source.uri] = source
    return _with_paths(project_name, list(found.values()))


def _defaults(declared: Any) -> Iterator[str]:
    default = declared.default
    texts = default if isinstance(default, (list, tuple)) else [default]
    for text in texts:
        uri = str(text or "").strip()
        if "{parameter:" not in uri and _is_external(uri):
            yield uri


def _is_external(uri: str) -> bool:
    scheme, separator, rest = uri.partition("://")
    if not separator or not rest:
        return False
    if scheme.lower() in NAMED:
        return not is_datum_id(rest)
    return scheme.lower() in OUTSIDE


def _source(uri: str, step: Any, declared: Any) -> ExternalSource:
    shown = public_uri(uri)
    descends = declared.keep_directories.value != "none"
    use = SourceUse(step=step.name, input=declared.name, asked=shown)
    return ExternalSource(
        uri=_spelled_out(shown, descends=descends),
        read=_spelled_out(uri, descends=descends),
        path=(),
        environment=step.step.environment,
        uses=(use,),
        keeps_directories=descends,
    )


def _is_web(uri: str) -> bool:
    return uri.lower().startswith(("http://", "https://"))


def _spelled_out(uri: str, *, descends: bool) -> str:
    """I-03, I-06: a trailing slash means everything below, and so does `/*` where directories are kept."""
    if _is_web(uri) or uri.startswith(tuple(f"{name}://" for name in NAMED)):
        return uri
    if uri.endswith("/"):
        return uri + "**"
    if descends and uri.endswith("/*"):
        return uri + "*"
    return uri


def _with_paths(project_name: str, sources: list[ExternalSource]) -> list[ExternalSource]:
    paths = [(project_name, EXTERNAL, *_parts(source.uri)) for source in sources]
    count = Counter(paths)
    return [
        replace(source, path=path if count[path] == 1 else _marked(path, source.uri))
        for path, source in zip(paths, sources, strict=True)
    ]


def _parts(uri: str) -> Iterator[str]:
    """Scheme, place and path as legal names; a query only as a digest."""
    scheme, _, rest = uri.partition("://")
    place, query = rest, ""
    if _is_web(uri):
        split = urlsplit(uri)
        place, query = f"{split.netloc}{split.path}", split.query
    parts = [part for part in place.split("/") if part]
    first = next((n for n, part in enumerate(parts) if "*" in part and n), len(parts))
    parts = [
        *parts[: first - 1],
        "/".join(parts[first - 1 :]),
    ]  # a pattern needs its directory's name
    yield scheme.lower()
    for number, part in enumerate(parts, 1):
        plain = unquote(part).replace("**", " all below ").replace("*", " any ")
        legal = legal_name(plain, fallback="part").strip("_") or "_"
        last = number == len(parts)
        yield f"{legal}_{_digest(query)}" if last and query else legal


def _marked(path: KeyPath, uri: str) -> KeyPath:
    return (*path[:-1], f"{path[-1]}_{_digest(uri)}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:MARK]
