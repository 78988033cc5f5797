"""All that Dagster sees; registered with `dg`, which lists the component below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from valohai_dagster.plugin.component import ValohaiProjectComponent

__all__ = ["ValohaiProjectComponent"]


def __getattr__(name: str) -> Any:
    if name == "ValohaiProjectComponent":
        from valohai_dagster.plugin.component import ValohaiProjectComponent

        return ValohaiProjectComponent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
