"""What `--help` prints is what was written: nothing in brackets is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from valohai_dagster.cli.app import app

PLAIN = re.compile(r"(?<!\\)\[/?[a-z#@][^\[\]]*\]")


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    if hasattr(command, "list_commands"):
        context = command.context_class(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), *path, name)


ALL = dict(commands(get_command(app)))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_no_help_holds_brackets_that_are_taken_for_markup(path: tuple[str, ...]) -> None:
    command = ALL[path]
    texts = [command.help or "", *(getattr(one, "help", None) or "" for one in command.params)]
    assert [found for text in texts for found in PLAIN.findall(text)] == []


def test_the_help_names_the_settings_of_retention() -> None:
    assert "settings under [retention]" in CliRunner().invoke(app, ["--help"]).output
