"""The drawn trace in a browser: a wide one scrolls inside its frame, and the page stays as wide as its window."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from valohai_dagster.data.trace import Edge, Node, Trace
from valohai_dagster.data.trace_folding import cut, fold
from valohai_dagster.web.trace_page import HEADERS, trace_page

if TYPE_CHECKING:
    from pathlib import Path

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


PLACES = """() => {
  const box = document.querySelector('.root rect.box').getBoundingClientRect();
  const frame = document.querySelector('.drawing').getBoundingClientRect();
  const left = Math.max(frame.left, 0), right = Math.min(frame.right, innerWidth);
  const top = Math.max(frame.top, 0), bottom = Math.min(frame.bottom, innerHeight);
  return box.left >= left && box.right <= right && box.top >= top && box.bottom <= bottom;
}"""


def thousands(each: int) -> Trace:
    """`each` files -> an execution -> as many files, of which one in the middle is traced."""
    trace = Trace(roots=("file:out-1000",))
    facts = {"status": "complete", "commit": "c0ffee"}
    for ident in ("many", "work"):
        node = Node(kind="execution", id=ident, title=f"{ident} #1", facts=facts)
        trace.nodes[node.key] = node
    for kind in ("in", "out"):
        for n in range(each):
            node = Node(kind="file", id=f"{kind}-{n}", title=f"{kind}{n}.txt", facts={"size": 10})
            trace.nodes[node.key] = node
            ends = ("execution:many" if kind == "in" else "execution:work", node.key)
            trace.edges.append(Edge(source=ends[0], target=ends[1]))
            if kind == "in":
                edge = Edge(source=node.key, target="execution:work", label="files")
                trace.edges.append(edge)
    return trace


def opened(page: Page, trace: Trace) -> None:
    """As a browser gets it from the service, with its headers."""
    answer = {"body": trace_page(trace), "headers": HEADERS, "content_type": "text/html"}
    page.route("http://trace.example/**", lambda route: route.fulfill(**answer))
    page.goto("http://trace.example/datum/out-1000/trace")


@pytest.mark.parametrize("width", [1400, 700])
def test_a52_the_traced_file_is_in_view_among_thousands(
    page: Page, artifacts: Path, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    trace = thousands(2000)
    opened(page, cut(trace, 5000))
    page.screenshot(path=artifacts / f"trace-all-{width}.png")
    assert page.evaluate(PLACES)
    opened(page, cut(fold(trace)))
    page.screenshot(path=artifacts / f"trace-folded-{width}.png")
    assert page.evaluate(PLACES)
    assert sorted(page.locator("svg .title").all_text_contents()) == [
        "1,999 files", "2,000 files", "many #1", "out1000.txt", "work #1",
    ]  # fmt: skip


def test_what_does_not_fit_is_told(page: Page) -> None:
    """1400 pixels are enough for six columns; twenty are told to scroll."""
    page.set_viewport_size({"width": 1400, "height": 1000})
    for length, told in ((6, False), (20, True)):
        opened(page, replace(chain(length), roots=(f"file:{length - 1}",)))
        assert page.locator(".wide").is_visible() is told
        assert page.evaluate("document.querySelector('.drawing').scrollLeft > 0") is told
        assert page.evaluate(PLACES)
