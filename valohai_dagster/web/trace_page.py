"""The page that draws a trace: SVG made here, no scripts, nothing from elsewhere, every text escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from valohai_agent.checksums import decimal_size
from valohai_dagster.data.printable import version_words
from valohai_dagster.data.trace import Node, Trace
from valohai_dagster.data.trace_layout import Layout, Place, place

WIDTH, HEIGHT = 212, 58  # of a box
GAP_X, GAP_Y = 84, 18
MARGIN = 16
TITLE_CHARS, FACT_CHARS = 25, 29
LEAST_SCALE = 0.75  # down to which a wide drawing shrinks before it scrolls
KINDS = {
    "file": "File",
    "execution": "Execution",
    "outside": "From outside",
    "dataset": "Dataset version",
    "model": "Model version",
    "files": "Files",
    "sources": "From outside",
}
COLOURS = {"files": "file", "sources": "outside"}  # where it is not the kind's own
BODY_PADDING = 28
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# Shadows at the edges behind which there is more: covers that scroll along hide them at the ends.
_SHADOWS = ", ".join(
    [
        "linear-gradient(to right, var(--box) 40%, transparent) left / 44px 100% no-repeat local",
        "linear-gradient(to left, var(--box) 40%, transparent) right / 44px 100% no-repeat local",
        "linear-gradient(to right, var(--line), transparent) left / 14px 100% no-repeat scroll",
        "linear-gradient(to left, var(--line), transparent) right / 14px 100% no-repeat scroll",
    ]
)
_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --ink: #20242c; --dim: #667085; --line: #a5aebc; --box: #ffffff;
  --file: #5b6b82; --execution: #3a63d8; --outside: #b36a00; --dataset: #1c8054; --model: #7c3fc0; --bad: #c5303b;
  --root: #fff4d6; --rule: #e3e6ea; --frame: #ccd2da; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171c; --ink: #e8eaee; --dim: #98a2b3; --line: #596273;
  --box: #1d2129; --file: #94a5bd; --execution: #7fa0ff; --outside: #e0a34a; --dataset: #58c795; --model: #bd93f2;
  --bad: #ff7b84; --root: #3a3320; --rule: #2b313b; --frame: #414957; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 24px %(padding)dpx 48px; background: var(--bg); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 20px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 28px 0 8px; }
p { margin: 0 0 10px; color: var(--dim); }
a { color: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 14px 0 10px; color: var(--dim); font-size: 12.5px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.drawing { overflow: auto; max-height: 85vh; border: 1px solid var(--rule); border-radius: 10px;
  background: %(shadows)s; background-color: var(--box); }
.wide { display: none; }
@media (max-width: %(least)dpx) { .wide { display: block; } }
.drawing::-webkit-scrollbar { width: 12px; height: 12px; }
.drawing::-webkit-scrollbar-thumb { background: var(--line); border: 3px solid var(--box); border-radius: 6px; }
.drawing::-webkit-scrollbar-corner { background: transparent; }
@supports not selector(::-webkit-scrollbar) { .drawing { scrollbar-color: var(--line) var(--box); } }
svg { display: block; }
svg text { font-family: inherit; fill: var(--ink); }
svg .title { font-size: 13px; font-weight: 600; }
svg .fact { font-size: 11.5px; fill: var(--dim); }
svg .label { font-size: 11px; fill: var(--dim); paint-order: stroke; stroke: var(--box); stroke-width: 4px; }
svg .edge { fill: none; stroke: var(--line); stroke-width: 1.4; }
svg rect.box { fill: var(--box); stroke: var(--frame); }
svg .root rect.box { fill: var(--root); stroke: var(--outside); stroke-width: 1.5; }
svg a:hover rect.box { stroke: var(--execution); }
svg a:focus { outline: none; }
svg a:focus rect.box { stroke: var(--execution); stroke-width: 2.5; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 500; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.bad { color: var(--bad); }
"""


def trace_page(trace: Trace, *, webserver_url: str = "") -> str:
    """The whole document. `webserver_url`: where runs are shown, for links; none without it."""
    roots = [trace.nodes[key] for key in trace.roots if key in trace.nodes]
    title = roots[0].title if roots else "Trace"
    kind = KINDS[roots[0].kind].lower() if roots else "thing"
    drawing, width = _drawing(trace)
    least = round(width * LEAST_SCALE) + 2 * BODY_PADDING
    values = {"padding": BODY_PADDING, "least": least, "shadows": _SHADOWS}
    style = re.sub(r"%\((\w+)\)[ds]", lambda found: str(values[found[1]]), _STYLE)
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}: trace</title><style>{style}</style></head><body>",
            (
                f"<h1>{escape(title)}</h1><p>Trace of this {kind}: what it was made of, and what came of it. "
                "Time goes from left to right.</p>"
            ),
            _root_facts(roots[0]) if roots else "",
            _more(trace),
            _legend(trace),
            '<p class="wide">The drawing is wider than this window: scroll it sideways, also with the arrow keys.</p>',
            '<div class="drawing" role="region" aria-label="Drawing" tabindex="0">',  # keys scroll it too
            drawing,
            "</div>",
            _executions(trace, webserver_url),
            "</body></html>",
        ]
    )


def _more(trace: Trace) -> str:
    """What is not drawn, and where it is."""
    told = []
    if any(node.count > 1 for node in trace.nodes.values()):
        told.append(
            "<p>Files that were made and used alike share a box. "
            '<a href="?all=1">Draw each of them</a>, or use <code>data trace --all</code>.</p>'
        )
    if trace.truncated:
        number = (
            f"{trace.left_out:,} more things are" if trace.left_out else "There is more that is"
        )
        told.append(
            f'<p class="bad">{number} not drawn here. The trace of a box that is drawn, one click away, shows what '
            "is around it.</p>"
        )
    return "".join(told)


def _root_facts(node: Node) -> str:
    shown = {
        name: value for name, value in node.facts.items() if name in ("uri", "sha256", "commit")
    }
    items = [f"{name}: <code>{escape(str(value))}</code>" for name, value in shown.items()]
    if node.facts.get("purged"):
        items.append('<span class="bad">its content was purged, the record is kept</span>')
    return f"<p>{'<br>'.join(items)}</p>" if items else ""


def _legend(trace: Trace) -> str:
    shown = {COLOURS.get(node.kind, node.kind) for node in trace.nodes.values()}
    kinds = [kind for kind in KINDS if kind in shown]
    items = [
        f'<span><i style="background:var(--{kind})"></i>{KINDS[kind]}</span>' for kind in kinds
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _drawing(trace: Trace) -> tuple[str, int]:
    """The SVG and its width in pixels."""
    layout = place(trace)
    places = layout.places
    columns = max((one.column for one in places.values()), default=0) + 1
    passed = [one for way in layout.routes.values() for one in way]
    rows = max((one.row for one in [*places.values(), *passed]), default=0.0) + 1
    width = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP_X
    height = round(2 * MARGIN + rows * HEIGHT + (rows - 1) * GAP_Y)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="Trace" '
            f'style="width:100%;height:auto;max-width:{width}px;min-width:{round(width * LEAST_SCALE)}px">'
        ),
        *_edges(trace, layout),
        *(
            _box(node, places[key], root=key in trace.roots, focus=key == trace.roots[0])
            for key, node in trace.nodes.items()
        ),
        "</svg>",
    ]
    return "".join(parts), width


def _corner(where: Place) -> tuple[float, float]:
    return MARGIN + where.column * (WIDTH + GAP_X), MARGIN + where.row * (HEIGHT + GAP_Y)


def _edges(trace: Trace, layout: Layout) -> Iterator[str]:
    """Curves between columns, and straight across those that an edge only passes."""
    labels: list[str] = []
    for edge in trace.edges:
        x1, y1 = _corner(layout.places[edge.source])
        x1, y1 = x1 + WIDTH, y1 + HEIGHT / 2
        path = [f"M{x1:.1f} {y1:.1f}"]
        stops = layout.routes.get((edge.source, edge.target), ())
        ends = [_corner(one) for one in (*stops, layout.places[edge.target])]
        for n, (x2, top) in enumerate(ends):
            y2, last = top + HEIGHT / 2, n == len(ends) - 1
            bend, tip = max(40.0, (x2 - x1) / 2), x2 - 5 if last else x2
            path.append(f"C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {tip:.1f} {y2:.1f}")
            if not last:
                x1, y1 = x2 + WIDTH, y2
                path.append(f"H{x1:.1f}")
        x2, y2 = ends[-1][0], ends[-1][1] + HEIGHT / 2
        yield (
            f'<path class="edge" d="{" ".join(path)}"/>'
            f'<path d="M{x2 - 6:.1f} {y2 - 4:.1f} l6 4 l-6 4 z" fill="var(--line)"/>'
        )
        if edge.label not in ("", "in"):
            text = escape(_cut(edge.label, 13))
            x, y = (x1 - WIDTH / 2, y1 - 5) if stops else ((x1 + x2) / 2, (y1 + y2) / 2 + 3.5)
            labels.append(
                f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
            )
    yield from labels


def _box(node: Node, where: Place, *, root: bool, focus: bool) -> str:
    """`focus`: the browser brings it into view when the page opens."""
    x, y = _corner(where)
    bad = node.facts.get("status") in ("error", "crashed") or node.facts.get("purged")
    colour = "bad" if bad else COLOURS.get(node.kind, node.kind)
    told = "\n".join([f"{KINDS[node.kind]} {node.title}", *_fact_lines(node)])
    pile = (
        f'<rect class="box" x="{x + 5:.1f}" y="{y + 5:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
        if node.count > 1
        else ""
    )
    body = (
        f"<title>{escape(told)}</title>{pile}"
        f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="5" height="{HEIGHT}" rx="2.5" fill="var(--{colour})"/>'
        f'<text class="title" x="{x + 16:.1f}" y="{y + 24:.1f}">{escape(_cut(node.title, TITLE_CHARS))}</text>'
        f'<text class="fact" x="{x + 16:.1f}" y="{y + 43:.1f}">{escape(_cut(_line(node), FACT_CHARS))}</text>'
    )
    link = _link(node)
    linked = f'<a href="{escape(link)}"{" autofocus" * focus}>{body}</a>' if link else body
    return f'<g class="{"root" if root else "node"}">{linked}</g>'


def _link(node: Node) -> str | None:
    """From the page of any other node."""
    if node.count > 1:
        return "?all=1"
    if node.kind == "file":
        return f"../../datum/{node.id}/trace"
    return f"../../execution/{node.id}/trace" if node.kind == "execution" else None


def _line(node: Node) -> str:
    """The second line of a box."""
    facts = node.facts
    if node.count > 1:
        return f"{decimal_size(facts['size'])} · {', '.join(facts['names'])}"
    if node.kind == "execution":
        commit = str(facts.get("commit", ""))
        return f"{facts.get('status', '')} at {commit[: 13 if commit.startswith('~') else 12]}"
    if node.kind == "file":
        aliases = ", ".join(facts.get("aliases", ()))
        parts = [
            decimal_size(facts.get("size", 0)),
            aliases,
            "purged" if facts.get("purged") else "",
        ]
        return " · ".join(part for part in parts if part)
    if node.kind == "outside":
        return str(facts.get("uri", ""))
    return str(facts.get("state") or facts.get("status") or KINDS[node.kind])


def _fact_lines(node: Node) -> Iterator[str]:
    for name, value in node.facts.items():
        if name == "size":
            value = decimal_size(value)
        elif name == "version":
            value = version_words(value)
        elif value is True:
            value = "yes"
        yield f"{name.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else value}"


def _executions(trace: Trace, webserver_url: str) -> str:
    rows = [node for node in trace.nodes.values() if node.kind == "execution"]
    if not rows:
        return ""
    rows.sort(key=lambda node: str(node.facts.get("created")))
    head = "<tr><th>Execution</th><th>Status</th><th>Commit</th><th>Created</th><th>Dagster run</th></tr>"
    body = "".join(_row(node, webserver_url) for node in rows)
    return f"<h2>Executions</h2><table>{head}{body}</table>"


def _row(node: Node, webserver_url: str) -> str:
    run = str(node.facts.get("run", ""))
    shown = escape(run[:8])
    if run and webserver_url:
        shown = f'<a href="{escape(webserver_url.rstrip("/"))}/runs/{escape(run)}">{shown}</a>'
    cells: Sequence[Any] = [
        f'<a href="{escape(_link(node) or "")}">{escape(node.title)}</a>',
        escape(str(node.facts.get("status", ""))),
        f"<code>{escape(str(node.facts.get('commit', '')))}</code>",
        escape(str(node.facts.get("created", ""))),
        shown,
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _cut(text: str, most: int) -> str:
    """Paths keep their end, which says more."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    if len(text) <= most:
        return text
    if "/" in text:
        return "…" + text[-(most - 1) :]
    return text[: most - 1] + "…"
