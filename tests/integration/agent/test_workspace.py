"""Work directories belong to one living agent, and are removed whatever user code left in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from valohai_agent.errors import WorkspaceError
from valohai_agent.runtimes import namespace
from valohai_agent.workspace import Workspace, reap_leftovers


def test_k01_all_directories_exist_and_are_empty(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path, "e", 1, "w")
    (workspace.outputs / "old").write_text("x")
    workspace.remove()
    assert os.listdir(tmp_path) == []
    again = Workspace.create(tmp_path, "e", 1, "w")
    assert os.listdir(again.outputs) == []


def test_two_agents_cannot_have_one_attempt(tmp_path: Path) -> None:
    Workspace.create(tmp_path, "e", 1, "first")
    with pytest.raises(WorkspaceError, match="belongs to a running agent \\(first\\)"):
        Workspace.create(tmp_path, "e", 1, "second")
    Workspace.create(tmp_path, "e", 2, "second")


def test_a_work_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match=r"file/e/1 cannot be made.*--work-dir"):
        Workspace.create(tmp_path / "file", "e", 1, "w")


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    workspace = Workspace.create(tmp_path / "work", "e", 1, "w")
    (workspace.outputs / "link").symlink_to(tmp_path / "precious")
    (workspace.outputs / "locked").mkdir(mode=0o000)
    workspace.remove()
    assert not workspace.root.exists()
    assert (tmp_path / "precious/file").exists()


def test_an_agent_that_died_leaves_logs_that_expire(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from valohai_agent.workspace import Workspace; "
        "w = Workspace.create(pathlib.Path(sys.argv[1]), 'e', 3, 'dead'); "
        "(w.logs / 'stdout').write_text('last words')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    [leftover] = reap_leftovers(tmp_path)
    assert (leftover.execution_id, leftover.attempt, leftover.worker) == ("e", 3, "dead")
    assert (leftover.logs / "stdout").read_text() == "last words"
    assert reap_leftovers(tmp_path) == []
    assert leftover.logs.exists()
    reap_leftovers(tmp_path, now=lambda: time.time() + 30 * 86400)
    assert os.listdir(tmp_path) == []


def test_a_user_without_rights_gets_valohai_by_a_user_namespace(
    tmp_path: Path, namespaces: None
) -> None:
    """Run as nobody where we are root, else as we are."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    for name in ("run", "outputs"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    binds = [namespace.Bind(source=str(tmp_path / "outputs"), target="/valohai/outputs")]
    command = "id -u > /valohai/outputs/uid; ls / > /valohai/outputs/root"
    argv = namespace.prepare(tmp_path / "run", binds, ["/bin/sh", "-c", command], cwd="/")
    (tmp_path / "run/root").chmod(0o777)
    drop: dict[str, Any] = {}
    if os.geteuid() == 0:
        drop = {"user": 65534, "group": 65534, "extra_groups": []}
        argv[0] = shutil.which("python3", path="/usr/bin:/usr/local/bin") or ""
        if not argv[0]:
            pytest.skip("elsewhere: no Python here that every user may run")
    result = subprocess.run(argv, capture_output=True, text=True, check=False, **drop)
    failure = namespace.failure(tmp_path / "run")
    assert result.returncode == 0, (result, failure)
    expected = 65534 if os.geteuid() == 0 else os.geteuid()
    assert (tmp_path / "outputs/uid").read_text() == f"{expected}\n"
    assert "valohai" in (tmp_path / "outputs/root").read_text().split()
    assert not Path("/valohai").exists()
