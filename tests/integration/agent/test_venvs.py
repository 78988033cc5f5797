"""The process runtime's virtual environments: who gets one, and which are used again."""

from __future__ import annotations

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
    venvs.warm_up()
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
    wait_for(lambda: not venv.exists(), what="the removal")
    assert venv not in spares(venvs)


def test_an_environment_that_may_still_be_in_use_is_not_used_again(venvs: Venvs) -> None:
    venv = venvs.take()
    venvs.give_back(venv, reusable=False)
    wait_for(lambda: not venv.exists(), what="the removal")


def test_two_jobs_never_share_one(venvs: Venvs) -> None:
    venvs.warm_up()
    first, second = venvs.take(), venvs.take()
    assert first != second
    venvs.give_back(first)
    venvs.give_back(second)


def test_a_tool_that_fails_is_said_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'trace'; echo 'no room here' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(fake))
    with pytest.raises(StartError, match="cannot be made: no room here"):
        Venvs(tmp_path / "venvs").take()
