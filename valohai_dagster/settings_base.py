"""What every table of the settings file has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the file; unknown keys are refused so that a typing error cannot pass unnoticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
