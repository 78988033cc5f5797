"""The `valohai-dagster` command: a thin root; each command's module is imported when it is used."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command; errors made for people are printed without a traceback, exit code 1."""
    from valohai_dagster.cli.app import app
    from valohai_dagster.errors import ValohaiError

    try:
        app()
    except ValohaiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
