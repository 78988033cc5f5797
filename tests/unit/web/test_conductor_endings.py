"""How a conductor ends when a part of it fails. Its parts are stand-ins: what is asked is which of them it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from valohai_dagster.settings import Settings
from valohai_dagster.web import conductor


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


async def fails(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("part", ["until_changed", "until_idle"])
def test_a_failing_watch_leaves_the_agents_alone(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go on with their executions, and the next conductor finds them."""
    stopped: list[float] = []

    async def stop_all(seconds: float) -> None:
        stopped.append(seconds)

    async def serve(_: Any) -> None:
        while not server.should_exit:
            await asyncio.sleep(0)

    async def until_changed(busy: Callable[[], bool], *, every: float) -> None:
        assert busy(), "it would cut the package that is being written"
        await (fails() if part == "until_changed" else forever())

    in_use = SimpleNamespace(until_changed=until_changed, announce=lambda: None)
    monkeypatch.setattr(conductor, "InUse", lambda *_, **__: in_use)
    monkeypatch.setattr(conductor, "_serve_executions", forever)
    monkeypatch.setattr(conductor, "_until_idle", fails if part == "until_idle" else forever)
    server: Any = SimpleNamespace(serve=serve, should_exit=False)
    groups, packager = SimpleNamespace(stop_all=stop_all), SimpleNamespace(busy=True)
    service: Any = SimpleNamespace(groups=groups, packager=packager, working=False)
    driving: Any = SimpleNamespace(busy=False)
    nothing: Any = None
    ending = conductor._serve_until_told(
        Settings(state_dir=tmp_path), service, driving, server, nothing, on_demand=True
    )
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(ending)
    assert stopped == []
