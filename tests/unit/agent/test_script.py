"""Command items become one script (C-20 to C-24)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from valohai_agent.runtimes.exits import explain
from valohai_agent.runtimes.script import build_script, names_valohai


def _run(tmp_path: Path, commands: list[str], *, fail_fast: bool = False) -> tuple[int, str]:
    path = tmp_path / "command"
    script = build_script(commands, fail_fast=fail_fast)
    path.write_text(script.text)
    path.chmod(0o755)
    result = subprocess.run(script.argv(str(path)), capture_output=True, text=True, check=False)
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        (["false", "true"], 0),
        (["true", "false"], 1),
        (["export A=1", 'test "$A" = 1'], 0),
        (["set -e", "false", "true"], 1),
        (["exit 7"], 7),
        (["nosuchcommand"], 127),
        (["", "   ", "true"], 0),
    ],
)
def test_v01_to_v04_c20_last_command_decides(
    tmp_path: Path, commands: list[str], code: int
) -> None:
    assert _run(tmp_path, commands)[0] == code


def test_c22_fail_fast_joins_with_and(tmp_path: Path) -> None:
    assert _run(tmp_path, ["false", "echo later"], fail_fast=True) == (1, "")


def test_c23_bash_is_preferred(tmp_path: Path) -> None:
    assert _run(tmp_path, ["echo ${BASH_VERSION:+bash}"]) == (0, "bash\n")


def test_v05_c24_a_shebang_chooses_the_interpreter(tmp_path: Path) -> None:
    commands = ["#!/usr/bin/env python3\nimport sys", "print(sys.argv[1:])"]
    assert _run(tmp_path, commands, fail_fast=True) == (0, "[]\n")


def test_c24_a_shebang_of_a_shell_still_joins_fail_fast() -> None:
    script = build_script(["#!/bin/sh -u", "a", "b"], fail_fast=True)
    assert script.text == "#!/bin/sh -u\na && b\n"
    assert script.direct


def test_line_numbers_in_the_shells_errors_count_the_items(tmp_path: Path) -> None:
    assert build_script(["one", "two"]).text.splitlines()[1] == "two"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("cat /valohai/inputs/x", True),
        ("cd /valohai", True),
        ("x='/valohai/outputs'", True),
        ("--out=/valohai/outputs", True),
        ("cat s3://bucket/valohai/x", False),
        ("cat ./valohai/x", False),
        ("/valohai-tools/run", False),
        ("cat $VH_INPUTS_DIR/x", False),
    ],
)
def test_commands_that_name_valohai_are_found(command: str, named: bool) -> None:
    assert (names_valohai(["true", command]) is not None) == named


def test_c29_an_out_of_memory_kill_is_named_with_its_limit() -> None:
    status = explain(137, oom=True, limit=64_000_000)
    assert status.oom_killed
    assert "out of memory (limit 64.0 MB)" in (status.message or "")


@pytest.mark.parametrize(
    ("code", "words"),
    [(127, "not found"), (126, "not executable"), (137, "SIGKILL"), (139, "SIGSEGV")],
)
def test_unusual_exit_codes_are_explained(code: int, words: str) -> None:
    assert words in (explain(code, oom=False).message or "")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_ordinary_exit_codes_are_not(code: int) -> None:
    assert explain(code, oom=False).message is None


def test_a_stop_of_ours_needs_no_explanation() -> None:
    assert explain(130, oom=False, signalled=True).message is None
