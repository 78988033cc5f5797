"""The clouds that the contract suite runs against: each module of tests/support/clouds/rigs is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.clouds import rigs
from tests.support.clouds.rig import Rig, RigModule

KINDS = sorted(path.stem for path in Path(rigs.__path__[0]).glob("*.py") if path.stem != "__init__")


def _module(kind: str) -> RigModule:
    return cast("RigModule", import_module(f"{rigs.__name__}.{kind}"))


def _params() -> list[Any]:
    """One per kind, marked by what it needs."""
    needs = {kind: _module(kind).NEED for kind in KINDS}
    return [
        pytest.param(kind, marks=(getattr(pytest.mark, need),) if need else ())
        for kind, need in needs.items()
    ]


@pytest.fixture(scope="session")
def _servers() -> Iterator[tuple[ExitStack, dict[str, Any]]]:
    with ExitStack() as stack:
        yield stack, {}


@pytest.fixture(params=_params())
def rig(
    request: pytest.FixtureRequest,
    _servers: tuple[ExitStack, dict[str, Any]],
    tmp_path: Path,
) -> Iterator[Rig]:
    """An account with nothing in it."""
    kind: str = request.param
    stack, running = _servers
    if kind not in running:
        running[kind] = stack.enter_context(_module(kind).serving())
    with _module(kind).opened(running[kind], tmp_path) as opened:
        yield opened
