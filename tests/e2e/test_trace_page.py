"""The drawn trace in a browser: a wide one scrolls inside its frame, and the page stays as wide as its window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from valohai_dagster.data.trace import Edge, Node, Trace
from valohai_dagster.web.trace_page import trace_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

MEASURE = """() => {
  const frame = document.querySelector('.drawing');
  frame.focus();
  return {
    page: document.documentElement.scrollWidth <= window.innerWidth,
    scrolls: frame.scrollWidth > frame.clientWidth,
    focused: document.activeElement === frame,
  };
}"""


def chain(length: int) -> Trace:
    trace = Trace(roots=("file:0",))
    for number in range(length):
        version = "Sun, 22 Nov 2026 16:00:00 GMT|8"
        facts = {"uri": f"datum://{number}", "size": 70591, "version": version, "purged": True}
        node = Node(kind="file", id=str(number), title=f"table-{number}.csv", facts=facts)
        trace.nodes[node.key] = node
        if number:
            trace.edges.append(Edge(source=f"file:{number - 1}", target=node.key))
    return trace


def test_a_wide_drawing_scrolls_inside_its_frame(page: Page) -> None:
    page.set_content(trace_page(chain(20)))
    assert page.evaluate(MEASURE) == {"page": True, "scrolls": True, "focused": True}


def test_facts_are_readable() -> None:
    text = trace_page(chain(1))
    assert "version: of 2026-11-22 16:00:00 UTC, 8 B" in text
    assert "size: 70.6 kB" in text
    assert "purged: yes" in text
