"""`valohai-dagster doctor`: is every part of this deployment there and well?"""

from __future__ import annotations

import dataclasses
import json

import typer
from rich.console import Console
from rich.markup import escape

from valohai_dagster.cli.checks import CHECKS, Finding, run_all
from valohai_dagster.settings import load_settings

_MARKS = {
    "ok": "[green]ok  [/green]",
    "note": "[cyan]note[/cyan]",
    "warn": "[yellow]warn[/yellow]",
    "fail": "[red]FAIL[/red]",
}


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
) -> None:
    """Check Redis, records, stores, the service, Docker, versions and Dagster's own settings.

    In the embedded default this starts Redis and the service, as a run would. Exit code 1 when something fails.
    """
    console = Console(highlight=False)
    findings: list[Finding] = []
    for finding in run_all(load_settings(), CHECKS):
        findings.append(finding)
        if not as_json:
            _print(console, finding)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def _print(console: Console, finding: Finding) -> None:
    mark = _MARKS[finding.level]
    console.print(f"{mark}  {finding.part:<9} {escape(finding.text)}", soft_wrap=True)
    if finding.hint:
        console.print(f"{'':16}-> {escape(finding.hint)}", soft_wrap=True)
