"""`python -m valohai_dagster` is the `valohai-dagster` command."""

from valohai_dagster.cli import main

main()
