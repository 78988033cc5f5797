"""Where a file comes from and what became of it (A-52), as a graph over the records.

Files are made by executions, which read other files: so the graph alternates, and it has no cycles, since a file is there
before it is read. It is cut at a depth and at a number of nodes, never silently. `trace_folding` makes it readable.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from valohai_dagster.data import aliases
from valohai_dagster.errors import NotFoundError, RefusedError
from valohai_dagster.records import tables as t
from valohai_dagster.stores.registry import Stores

MOST_READ = 20_000  # files, and as many executions
MOST_LINKS = 100_000  # of one kind, that one step follows
MOST_ROOTS = 100
DEPTH = 6  # executions on a way, each way
BATCH = 500  # ids in one query
SHORTEST_PREFIX = 8  # characters of a datum id that are enough

Kind = Literal["file", "execution", "outside", "dataset", "model", "files", "sources"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One thing, or `count` files of a kind (`files`, from outside: `sources`).

    `id` is unique within its kind; `facts` are for people, in order, without empty ones.
    """

    kind: Kind
    id: str
    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    count: int = 1

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.id}"


@dataclass(frozen=True, kw_only=True)
class Edge:
    """From what was there first to what came of it; `label`: the input's name, or what the file is in."""

    source: str  # key of a node
    target: str
    label: str = ""


@dataclass(kw_only=True)
class Trace:
    roots: tuple[str, ...]
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    truncated: bool = False  # there is more than is shown
    left_out: int = 0  # things of that which were met; what only they lead to is not counted

    def to_dict(self) -> dict[str, Any]:
        return {
            "roots": list(self.roots),
            "nodes": [
                {"key": node.key, "kind": node.kind, "id": node.id, "title": node.title}
                | {"count": node.count, "facts": dict(node.facts)}
                for node in self.nodes.values()
            ],
            "edges": [
                {"source": edge.source, "target": edge.target, "label": edge.label}
                for edge in self.edges
            ],
            "truncated": self.truncated,
            "left_out": self.left_out,
        }


def trace(
    conn: sa.Connection,
    roots: Sequence[str],
    *,
    up: bool = True,
    down: bool = True,
    depth: int = DEPTH,
    most: int = MOST_READ,
) -> Trace:
    """The graph around nodes (by key, see `find_roots`); `depth` counts executions each way.

    `most` executions and `most` other things are read, so that a file's many siblings never hide who made them.
    """
    builder = _Builder(conn, tuple(roots), most)
    builder.add(_load(conn, roots))
    for wanted, step in ((up, builder.up), (down, builder.down)):
        front = list(roots) if wanted else []
        seen: set[str] = set(front)
        for _ in range(2 * depth):
            front = [key for key in step(front) if key not in seen]
            seen.update(front)
            if not front:
                break
        else:
            builder.trace.truncated |= bool(front and list(step(front, dry=True)))
    return builder.trace


class _Builder:
    """Grows the trace level by level, in a few queries for each."""

    def __init__(self, conn: sa.Connection, roots: tuple[str, ...], most: int) -> None:
        self._conn, self._most = conn, most
        self.trace = Trace(roots=roots)
        self._edges: set[tuple[str, str, str]] = set()
        self._counts: Counter[bool] = Counter()  # nodes that are executions, and that are not
        self._left_out: set[str] = set()

    def add(self, nodes: Iterable[Node]) -> set[str]:
        """Keys of those that are in the trace now."""
        kept: set[str] = set()
        for node in nodes:
            if node.key not in self.trace.nodes:
                is_execution = node.kind == "execution"
                if self._counts[is_execution] >= self._most:
                    self._left_out.add(node.key)
                    self.trace.truncated, self.trace.left_out = True, len(self._left_out)
                    continue
                self._counts[is_execution] += 1
                self.trace.nodes[node.key] = node
            kept.add(node.key)
        return kept

    def up(self, front: Collection[str], *, dry: bool = False) -> list[str]:
        """What the nodes were made of."""
        edges = [
            *_makers(self._conn, _ids(front, "file")),
            *_read(self._conn, _ids(front, "execution")),
        ]
        for kind in ("dataset", "model"):
            edges += _contents(self._conn, _ids(front, kind), kind)
        return self._take(edges, "source", dry)

    def down(self, front: Collection[str], *, dry: bool = False) -> list[str]:
        """What was made of the nodes, and where files are kept."""
        files = _ids(front, "file")
        edges = [*_made(self._conn, _ids(front, "execution")), *_readers(self._conn, files)]
        edges += _outside_readers(self._conn, [self.trace.nodes.get(key) for key in front])
        for kind in ("dataset", "model"):
            edges += _containers(self._conn, files, kind)
        return self._take(edges, "target", dry)

    def _take(self, found: Sequence[tuple[Edge, Node | None]], end: str, dry: bool) -> list[str]:
        keys = list(dict.fromkeys(getattr(edge, end) for edge, _ in found))
        self.trace.truncated |= len(found) >= MOST_LINKS
        if dry:
            return [key for key in keys if key not in self.trace.nodes]
        known = {node.key: node for _, node in found if node is not None}
        missing = [key for key in keys if key not in known and key not in self.trace.nodes]
        kept = self.add([*known.values(), *_load(self._conn, missing)]) | set(self.trace.nodes)
        for edge, _ in found:
            identity = (edge.source, edge.target, edge.label)
            if identity not in self._edges and {edge.source, edge.target} <= kept:
                self._edges.add(identity)
                self.trace.edges.append(edge)
        return [key for key in keys if key in kept]


Found = list[tuple[Edge, "Node | None"]]


def _ids(keys: Iterable[str], kind: str) -> list[str]:
    return [key.partition(":")[2] for key in keys if key.startswith(f"{kind}:")]


def _rows(
    conn: sa.Connection, ids: Sequence[str], query: Callable[[Sequence[str]], sa.Select[Any]]
) -> Iterator[Any]:
    """Rows of the query for these ids, no more than MOST_LINKS."""
    room = MOST_LINKS
    for batch in _batches(ids):
        rows = conn.execute(query(batch).limit(room)).all()
        yield from rows
        room -= len(rows)
        if room <= 0:
            return


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def _makers(conn: sa.Connection, files: Sequence[str]) -> Found:
    c = t.datums.c
    query = sa.select(c.id, c.execution_id).where(c.execution_id.is_not(None))
    rows = _rows(conn, files, lambda batch: query.where(c.id.in_(batch)))
    return [(Edge(source=f"execution:{r.execution_id}", target=f"file:{r.id}"), None) for r in rows]


def _made(conn: sa.Connection, executions: Sequence[str]) -> Found:
    c = t.datums.c
    query = sa.select(c.id, c.execution_id).order_by(c.name)
    rows = _rows(conn, executions, lambda batch: query.where(c.execution_id.in_(batch)))
    return [(Edge(source=f"execution:{r.execution_id}", target=f"file:{r.id}"), None) for r in rows]


def _read(conn: sa.Connection, executions: Sequence[str]) -> Found:
    """Inputs of executions: datums, and what came from outside as it was then."""
    c = t.execution_inputs.c
    query = sa.select(t.execution_inputs).order_by(c.input, c.name)
    rows = _rows(conn, executions, lambda batch: query.where(c.execution_id.in_(batch)))
    return [_input_edge(row) for row in rows]


def _readers(conn: sa.Connection, files: Sequence[str]) -> Found:
    c = t.execution_inputs.c
    query = sa.select(t.execution_inputs)
    rows = _rows(conn, files, lambda batch: query.where(c.datum_id.in_(batch)))
    return [_input_edge(row) for row in rows]


def _outside_readers(conn: sa.Connection, nodes: Iterable[Node | None]) -> Found:
    """Executions that read the same content from the same place."""
    uris = [node.facts["uri"] for node in nodes if node is not None and node.kind == "outside"]
    c = t.execution_inputs.c
    query = sa.select(t.execution_inputs).where(c.datum_id.is_(None))
    return [
        _input_edge(row) for row in _rows(conn, uris, lambda batch: query.where(c.uri.in_(batch)))
    ]


def _input_edge(row: Any) -> tuple[Edge, Node | None]:
    target = f"execution:{row.execution_id}"
    if row.datum_id is not None:
        return Edge(source=f"file:{row.datum_id}", target=target, label=row.input), None
    content = row.version or row.sha256 or ""
    node = Node(
        kind="outside",
        id=hashlib.sha256(f"{row.uri}\n{content}".encode()).hexdigest()[:24],
        title=row.uri.rstrip("/").rpartition("/")[2] or row.uri,
        facts=_kept(uri=row.uri, size=row.size, version=row.version, sha256=row.sha256),
    )
    return Edge(source=node.key, target=target, label=row.input), node


_CONTAINERS: Mapping[str, Any] = {
    "dataset": (t.dataset_files, t.dataset_versions),
    "model": (t.model_files, t.model_versions),
}


def _contents(conn: sa.Connection, versions: Sequence[str], kind: str) -> Found:
    files = _CONTAINERS[kind][0].c
    query = sa.select(files.datum_id, files.version_id)
    return [
        (Edge(source=f"file:{row.datum_id}", target=f"{kind}:{row.version_id}"), None)
        for row in _rows(conn, versions, lambda batch: query.where(files.version_id.in_(batch)))
    ]


def _containers(conn: sa.Connection, datum_ids: Sequence[str], kind: str) -> Found:
    files = _CONTAINERS[kind][0].c
    query = sa.select(files.datum_id, files.version_id)
    return [
        (Edge(source=f"file:{row.datum_id}", target=f"{kind}:{row.version_id}", label="in"), None)
        for row in _rows(conn, datum_ids, lambda batch: query.where(files.datum_id.in_(batch)))
    ]


# -- nodes -----------------------------------------------------------------------------------------------------------


def _load(conn: sa.Connection, keys: Sequence[str]) -> list[Node]:
    """The nodes in the order of their keys; what the records have no more is left out."""
    found: dict[str, Node] = {}
    loaders = {"file": _files, "execution": _executions, "dataset": _datasets, "model": _models}
    for kind, load in loaders.items():
        for batch in _batches(_ids(keys, kind)):
            found.update((node.key, node) for node in load(conn, batch))
    return [found[key] for key in keys if key in found]


def _files(conn: sa.Connection, ids: Sequence[str]) -> Iterator[Node]:
    names: dict[str, list[str]] = {}
    a = t.datum_aliases.c
    for row in conn.execute(sa.select(a.datum_id, a.name).where(a.datum_id.in_(ids))):
        names.setdefault(row.datum_id, []).append(row.name)
    for row in conn.execute(sa.select(t.datums).where(t.datums.c.id.in_(ids))):
        yield Node(
            kind="file",
            id=row.id,
            title=row.name,
            facts=_kept(
                uri=f"datum://{row.id}",
                size=row.size,
                sha256=row.sha256,
                store=f"{row.store}: {row.key}",
                aliases=sorted(names.get(row.id, ())),
                tags=row.tags,
                created=row.ctime.isoformat(timespec="seconds"),
                of_lost_attempt=row.withdrawn,
                purged=row.purged,
            ),
        )


def _executions(conn: sa.Connection, ids: Sequence[str]) -> Iterator[Node]:
    e = t.executions.c
    columns = (e.id, e.step, e.counter, e.commit, e.status, e.image, e.run_id, e.ctime, e.ended_at)
    query = sa.select(*columns, t.projects.c.name.label("project"))
    query = query.join(t.projects, t.projects.c.id == e.project_id).where(e.id.in_(ids))
    for row in conn.execute(query):
        yield Node(
            kind="execution",
            id=row.id,
            title=f"{row.step} #{row.counter}",
            facts=_kept(
                project=row.project,
                status=row.status,
                commit=row.commit,
                image=row.image,
                run=row.run_id,
                created=row.ctime.isoformat(timespec="seconds"),
                ended=row.ended_at.isoformat(timespec="seconds") if row.ended_at else None,
            ),
        )


def _datasets(conn: sa.Connection, ids: Sequence[str]) -> Iterator[Node]:
    v, d = t.dataset_versions.c, t.datasets.c
    query = sa.select(v.id, v.name, d.name.label("dataset"), v.state, v.ctime)
    for row in conn.execute(query.join(t.datasets, d.id == v.dataset_id).where(v.id.in_(ids))):
        uri = f"dataset://{row.dataset}/{row.name}"
        facts = _kept(uri=uri, state=row.state, created=row.ctime.isoformat(timespec="seconds"))
        yield Node(kind="dataset", id=row.id, title=f"{row.dataset}/{row.name}", facts=facts)


def _models(conn: sa.Connection, ids: Sequence[str]) -> Iterator[Node]:
    v, m = t.model_versions.c, t.models.c
    query = sa.select(v.id, v.number, m.slug, v.status, v.ctime)
    for row in conn.execute(query.join(t.models, m.id == v.model_id).where(v.id.in_(ids))):
        uri = f"model://{row.slug}/{row.number}"
        facts = _kept(uri=uri, status=row.status, created=row.ctime.isoformat(timespec="seconds"))
        yield Node(kind="model", id=row.id, title=f"{row.slug}/{row.number}", facts=facts)


def _kept(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value not in (None, "", [], False)}


# -- what is meant ---------------------------------------------------------------------------------------------------


def find_roots(
    conn: sa.Connection, reference: str, *, stores: Stores, project_id: str | None = None
) -> list[str]:
    """Keys of what a person names: datum id (8 characters are enough), alias, sha256, file name, or a URI.

    Several datums of one content are all roots. Of several files of one name the newest counts. An empty list when the
    reference may still be an execution; raises NotFoundError for URIs, and RefusedError for what is ambiguous.
    """
    text = reference.strip()
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "datum":
        return _by_uri(conn, text, stores)
    name = rest if separator else text
    for look in (_by_id, _by_alias, _by_content, _by_name):
        if found := look(conn, name, project_id):
            return [f"file:{ident}" for ident in found]
    if separator:
        raise NotFoundError(f"{text}: there is no datum of that id or alias")
    return []


def _by_id(conn: sa.Connection, name: str, project_id: str | None) -> Sequence[str]:
    c, low = t.datums.c, name.lower()
    if aliases.is_datum_id(low):
        return conn.execute(sa.select(c.id).where(c.id == low)).scalars().all()
    if len(low) < SHORTEST_PREFIX or not set(low) <= set("0123456789abcdef-"):
        return ()
    query = sa.select(c.id).where(c.id.startswith(low, autoescape=True)).limit(4)
    found = conn.execute(query).scalars().all()
    if len(found) > 1:
        raise RefusedError(f"{name} fits several datums: {', '.join(found[:3])}; write more of it")
    return found


def _by_alias(conn: sa.Connection, name: str, project_id: str | None) -> Sequence[str]:
    c = t.datum_aliases.c
    query = sa.select(c.datum_id, c.project_id).where(c.name == name)
    if project_id is not None:
        query = query.where(c.project_id == project_id)
    rows = conn.execute(query).all()
    if len({row.project_id for row in rows}) > 1:
        raise RefusedError(f"the alias {name!r} exists in several projects; add --project")
    return [row.datum_id for row in rows]


def _by_content(conn: sa.Connection, name: str, project_id: str | None) -> Sequence[str]:
    digest = name.lower().removeprefix("sha256:")
    if len(digest) != 64:
        return ()
    c = t.datums.c
    query = sa.select(c.id).where(c.sha256 == digest).order_by(c.ctime).limit(MOST_ROOTS)
    return conn.execute(query).scalars().all()


def _by_name(conn: sa.Connection, name: str, project_id: str | None) -> Sequence[str]:
    c = t.datums.c
    query = sa.select(c.id).where(c.name == name).order_by(c.ctime.desc(), c.id).limit(1)
    if project_id is not None:
        query = query.where(c.project_id == project_id)
    return conn.execute(query).scalars().all()


def _by_uri(conn: sa.Connection, uri: str, stores: Stores) -> list[str]:
    """The datum whose content lies there, and executions that read it as something outside, before it was adopted."""
    found: Sequence[str] = ()
    served = stores.serving(uri)
    if served is not None:
        c, (store, key) = t.datums.c, served
        query = sa.select(c.id).where(c.store == store.name, c.key == key)
        found = conn.execute(query).scalars().all()
        uri = store.uri(key)
    c = t.execution_inputs.c
    query = sa.select(c.execution_id).where(c.uri == uri, c.datum_id.is_(None)).distinct()
    readers = conn.execute(query.limit(MOST_ROOTS)).scalars().all()
    if not found and not readers:
        raise NotFoundError(f"{uri}: no datum lies there, and no execution has read it")
    return [*(f"file:{ident}" for ident in found), *(f"execution:{ident}" for ident in readers)]
