"""The process runtime's virtual environments: who gets one, and which are used again."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.ports import wait_for
from valohai_agent.errors import StartError
from valohai_agent.runtimes import venvs as module
from valohai_agent.runtimes.venvs import Venvs


@pytest.fixture(scope="module")
def venvs(tmp_path_factory: pytest.TempPathFactory) -> Venvs:
    return Venvs(tmp_path_factory.mktemp("venvs"))


def spares(venvs: Venvs) -> list[Path]:
    return list(venvs._spares)


def test_an_environment_that_its_job_left_alone_is_the_next_jobs(venvs: Venvs) -> None:
    venvs.warm_up(1)
    first = venvs.take()
    subprocess.run([first / "bin/python", "-c", "import json"], check=True, cwd="/")
    assert spares(venvs) == []
    venvs.give_back(first)
    wait_for(lambda: spares(venvs) == [first], what="the environment among the spare ones")
    venvs.give_back(first)
    assert venvs.take() == first
    venvs.give_back(first)


@pytest.mark.parametrize(
    "change",
    [
        "echo x > new",
        "rm lib/python*/site-packages/pip/__init__.py",
        "echo '# more' >> lib/python*/site-packages/pip/__init__.py",
        "chmod a-x bin/pip",
    ],
)
def test_an_environment_that_its_job_changed_is_thrown_away(venvs: Venvs, change: str) -> None:
    venv = venvs.take()
    subprocess.run(["/bin/bash", "-c", change], check=True, cwd=venv)
    venvs.give_back(venv)
    wait_for(lambda: not venv.exists(), seconds=30, what="the removal")
    assert venv not in spares(venvs)


def test_an_environment_that_may_still_be_in_use_is_not_used_again(venvs: Venvs) -> None:
    venv = venvs.take()
    venvs.give_back(venv, reusable=False)
    wait_for(lambda: not venv.exists(), seconds=30, what="the removal")


def test_two_jobs_never_share_one_or_name_another(venvs: Venvs) -> None:
    venvs.warm_up(2)
    first, second = venvs.take(), venvs.take()
    assert first != second
    for venv in (first, second):
        command = ["bin/python", "-c", "import sys; print(sys.prefix)"]
        assert subprocess.check_output(command, cwd=venv, text=True).strip() == str(venv)
        pip = subprocess.check_output(["bin/pip", "--version"], cwd=venv, text=True)
        assert f"from {venv}/lib" in pip
        for file in venv.rglob("*"):
            if file.is_file() and not file.is_symlink() and file.suffix != ".pyc":
                content = file.read_bytes()
                assert content.count(bytes(venv.parent)) == content.count(bytes(venv)), file
    venvs.give_back(first)
    venvs.give_back(second)


def test_as_many_are_made_as_are_wanted_those_in_use_included(tmp_path: Path) -> None:
    venvs = Venvs(tmp_path)
    taken = venvs.take()
    venvs.warm_up(3)
    wait_for(lambda: not venvs._making, seconds=60, what="the making")
    assert len(set(spares(venvs))) == 2
    venvs.give_back(taken, reusable=False)
    wait_for(lambda: len(spares(venvs)) == 3, seconds=60, what="another one")


def test_the_next_agent_copies_what_the_last_one_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Venvs(tmp_path).take()
    made: list[Path] = []
    monkeypatch.setattr(Venvs, "_make_template", lambda self, link: made.append(link))
    second = Venvs(tmp_path)
    assert second.take() != first
    assert made == []


def test_a_template_that_vanished_is_made_again(tmp_path: Path) -> None:
    venvs = Venvs(tmp_path)
    venvs.take()
    shutil.rmtree(venvs._template())
    assert (venvs.take() / "bin" / "python").exists()


def test_a_tool_that_fails_is_said_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'trace'; echo 'no room here' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(fake))
    with pytest.raises(StartError, match="cannot be made: no room here"):
        Venvs(tmp_path / "venvs").take()
