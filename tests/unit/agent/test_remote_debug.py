"""What is said when SSH cannot be offered, and that the command never depends on it (K-60)."""

from __future__ import annotations

import sys
from typing import Any, cast

import pytest

from valohai_agent.host import Host
from valohai_agent.protocol import Job, RemoteDebug
from valohai_agent.remote_debug import remote_debug
from valohai_agent.runtimes.base import Running


def test_a_worker_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncssh", cast("Any", None))
    monkeypatch.delitem(sys.modules, "valohai_agent.ssh_server", raising=False)
    monkeypatch.delitem(sys.modules, "valohai_agent.ssh_session", raising=False)
    said: list[str] = []
    warned: list[str] = []
    wanted = RemoteDebug(port=2222, key="ssh-ed25519 AAAA")
    with remote_debug(
        wanted, cast("Running", None), host=Host(), status=said.append, warn=warned.append
    ):
        assert said == []
    [warning] = warned
    assert warning.startswith("Remote debugging is not available: ")
    assert "pip install 'valohai-agent[ssh]'" in warning


def test_an_older_control_plane_asks_for_nothing() -> None:
    assert Job.model_fields["remote_debug"].default is None
    with remote_debug(None, cast("Running", None), host=Host(), status=print, warn=print):
        pass
