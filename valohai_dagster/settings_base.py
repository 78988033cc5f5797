"""What every table of the settings file has in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator


class Section(BaseModel):
    """A table of the file; unknown keys are refused so that a typing error cannot pass unnoticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def by_kind(what: str, kinds: Iterable[str], *, default: str) -> Discriminator:
    """Chooses the model of a section by its `kind`; a section without one has the default."""

    def kind_of(value: Any) -> str:
        is_table = isinstance(value, dict)
        return str(value.get("kind", default) if is_table else getattr(value, "kind", None))

    return Discriminator(
        kind_of,
        custom_error_type=f"{what}_kind",
        custom_error_message="kind must be one of " + ", ".join(kinds),
    )
