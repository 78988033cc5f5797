"""`valohai-dagster data trace`: where a file comes from, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import sqlalchemy as sa
import typer

from valohai_dagster.cli.lookup import find_executions
from valohai_dagster.cli.render import size_text
from valohai_dagster.data.printable import printable, version_words
from valohai_dagster.data.trace import DEPTH, Edge, Node, Trace, find_roots
from valohai_dagster.data.trace import trace as build_trace
from valohai_dagster.data.trace_folding import cut, fold
from valohai_dagster.errors import NotFoundError
from valohai_dagster.records.engine import open_records
from valohai_dagster.records.tables import projects
from valohai_dagster.settings import load_settings
from valohai_dagster.stores.registry import Stores, open_stores

HELP = (
    "A file: datum://ID, id (8 characters are enough), alias, sha256, name, or the URI of its content. "
    "Or an execution: id, run id, PROJECT#NUMBER, latest."
)


def trace(
    what: Annotated[str, typer.Argument(metavar="FILE|EXECUTION", help=HELP)],
    up: Annotated[bool, typer.Option("--up", help="Only what it was made of.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Only what came of it.")] = False,
    depth: Annotated[int, typer.Option(min=1, help="Executions on a way, each way.")] = DEPTH,
    project: Annotated[
        str | None, typer.Option("--project", "-p", help="Project that an alias or name is of.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Name each of many files that were made and used alike.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the graph as JSON.")] = False,
) -> None:
    """Traces a file both ways: the executions, inputs and commits behind it, and what uses it.

    Many files that were made by the same execution and read by the same inputs are one line; --all names each.
    """
    settings = load_settings()
    records, stores = open_records(settings), open_stores(settings)
    try:
        with records.read() as connection:
            roots = roots_of(connection, what, stores=stores, project=project)
            both = up == down
            found = build_trace(connection, roots, up=up or both, down=down or both, depth=depth)
    finally:
        records.close()
    if not every:
        found = cut(fold(found))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    typer.echo("\n".join(lines_of(found, up=up or both, down=down or both)))
    page = _page(found, settings.base_url)
    if page:
        typer.echo(f"\nDrawn at {page}")


def roots_of(
    connection: sa.Connection, what: str, *, stores: Stores, project: str | None = None
) -> list[str]:
    """Keys of what is meant: a file, else an execution. Raises NotFoundError naming what was looked for."""
    project_id = None
    if project is not None:
        query = sa.select(projects.c.id).where(projects.c.name == project)
        project_id = connection.execute(query).scalar_one_or_none()
        if project_id is None:
            raise NotFoundError(f"there is no project {project!r}; `project ls` lists them")
    roots = find_roots(connection, what, stores=stores, project_id=project_id)
    if roots:
        return roots
    try:
        return [f"execution:{one}" for one in find_executions(connection, what)]
    except NotFoundError:
        raise NotFoundError(f"nothing in the records fits {what!r}. {HELP}") from None


def _page(found: Trace, base_url: str) -> str | None:
    kind, _, ident = found.roots[0].partition(":")
    places = {"file": "datum", "execution": "execution"}
    return f"{base_url}/{places[kind]}/{ident}/trace" if kind in places else None


def lines_of(found: Trace, *, up: bool, down: bool) -> list[str]:
    """Both ways as indented text; what was shown once is not unfolded again."""
    out: list[str] = []
    for root in found.roots:
        node = found.nodes.get(root)
        if node is None:
            continue
        out.append(_words(node))
        if up:
            out += _section("made from", found, root, upwards=True)
        if down:
            out += _section("used by", found, root, upwards=False)
    if any(node.count > 1 for node in found.nodes.values()):
        out.append("Files that were made and used alike share a line; --all names each of them.")
    if found.truncated:
        more = f"{found.left_out:,} more things are" if found.left_out else "There is more that is"
        out.append(
            f"{more} not shown; go on from one of the last with `data trace`, or use --depth or --all."
        )
    return out


def _section(title: str, found: Trace, root: str, *, upwards: bool) -> list[str]:
    links: dict[str, list[tuple[str, Edge]]] = {}
    for edge in found.edges:
        here, there = (edge.target, edge.source) if upwards else (edge.source, edge.target)
        links.setdefault(here, []).append((there, edge))
    lines = list(_tree(found, links, root, 2, {root}))
    return [f"  {title}:", *lines] if lines else [f"  {title}: nothing that the records know"]


def _tree(
    found: Trace,
    links: Mapping[str, Sequence[tuple[str, Edge]]],
    key: str,
    depth: int,
    seen: set[str],
) -> Iterator[str]:
    """`links`: what the node leads to this way."""
    for there, edge in links.get(key, ()):
        again = there in seen
        seen.add(there)
        text = _words(found.nodes[there], edge)
        yield "  " * depth + text + (" (see above)" if again else "")
        if not again:
            yield from _tree(found, links, there, depth + 1, seen)


def _words(node: Node, edge: Edge | None = None) -> str:
    """One line for one thing."""
    facts = node.facts
    label = f"{edge.label}: " if edge is not None and edge.label not in ("", "in") else ""
    title = printable(node.title)
    if node.kind == "execution":
        run = f", run {str(facts['run'])[:8]}" if facts.get("run") else ""
        return (
            f"{label}{title} ({facts.get('status')}, commit {str(facts.get('commit'))[:13]}{run})"
        )
    if node.kind == "outside":
        version = version_words(facts["version"]) if facts.get("version") else ""
        known = version or facts.get("sha256") or "version unknown"
        return f"{label}{printable(str(facts['uri']))} ({printable(known)[:60]})"
    if node.count > 1:
        parts = [size_text(facts["size"]), f"{', '.join(map(printable, facts['names']))}, ..."]
        parts += [f"{facts['purged']:,} purged"] if facts.get("purged") else []
        where = f" of {printable(str(facts['uri']))}" if node.kind == "sources" else ""
        return (
            f"{label}{title}{where} ({': '.join(parts[:2])}{''.join(f'; {p}' for p in parts[2:])})"
        )
    if node.kind in ("dataset", "model"):
        return f"{label}{facts['uri']}"
    parts = [size_text(facts.get("size", 0)), str(facts.get("uri", ""))]
    parts += [f"alias {name}" for name in facts.get("aliases", ())]
    parts += ["purged"] if facts.get("purged") else []
    return f"{label}{title} ({', '.join(parts)})"
