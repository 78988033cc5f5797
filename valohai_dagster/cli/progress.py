"""Live progress lines of several executions at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.markup import escape

from valohai_dagster.cli.render import metrics_text
from valohai_dagster.errors import ServiceUnavailable
from valohai_dagster.executions.client import ExecutionClient
from valohai_dagster.executions.stream import EventKind, FollowEvent

METRICS_SECONDS = 1.0  # at most one line of metrics per execution in this time
FINISH_SECONDS = 5.0  # how long `finish` waits for the last lines


class ProgressLines:
    """One following thread per execution; lines carry the step and the seconds since the start."""

    def __init__(
        self,
        client: ExecutionClient,
        console: Console,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._console = console
        self._monotonic = monotonic
        self._began = monotonic()
        self._threads: dict[str, threading.Thread] = {}

    def add(self, executions: Mapping[str, str]) -> None:
        """Follows those (id -> step) that are not followed yet."""
        for execution, step in executions.items():
            if execution not in self._threads:
                thread = threading.Thread(target=self._follow, args=(execution, step), daemon=True)
                self._threads[execution] = thread
                thread.start()

    def finish(self) -> None:
        """Waits a moment for followers that have not seen the end yet."""
        deadline = self._monotonic() + FINISH_SECONDS
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - self._monotonic()))

    def _follow(self, execution: str, step: str) -> None:
        writer = EventWriter(lambda text: self._print(step, text), monotonic=self._monotonic)
        try:
            for event in self._client.follow(execution):
                if event is not None:
                    writer.write(event)
        except ServiceUnavailable as error:
            self._print(step, f"[yellow]cannot follow: {escape(str(error))}[/yellow]")

    def _print(self, step: str, text: str) -> None:
        seconds = self._monotonic() - self._began
        self._console.print(
            f"[dim]{seconds:6.1f} s[/dim]  [bold]{escape(step):<12}[/bold] {text}", soft_wrap=True
        )


class EventWriter:
    """Which events of one execution become a line: all changes, and now and then the metrics."""

    def __init__(
        self, write: Callable[[str], None], *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._monotonic = monotonic
        self._last_metrics = -METRICS_SECONDS
        self._held: str | None = None
        self._last_text = ""

    def write(self, event: FollowEvent) -> None:
        if event.kind is EventKind.metadata:
            self._metrics(metrics_text(event.data.get("latest") or {}))
            return
        self._release()
        if event.kind is EventKind.snapshot:
            return
        style = {EventKind.warning: "yellow", EventKind.progress: "dim"}.get(event.kind)
        self._line(event.message, style)

    def _metrics(self, text: str) -> None:
        """The first at once, then one a second; the newest held one comes before the next other line."""
        if self._monotonic() - self._last_metrics >= METRICS_SECONDS:
            self._last_metrics = self._monotonic()
            self._held = None
            self._line(text, "cyan")
        else:
            self._held = text

    def _release(self) -> None:
        if self._held:
            self._line(self._held, "cyan")
            self._held = None

    def _line(self, message: str, style: str | None) -> None:
        text = escape(message.strip())
        if text and text != self._last_text:
            self._last_text = text
            self._write(f"[{style}]{text}[/{style}]" if style else text)
