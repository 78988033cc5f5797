"""What is asked of one input, before its URIs are resolved."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class InputSpec(BaseModel):
    """URIs of one input, not resolved yet; `{parameter:NAME}` already replaced (I-04)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    uris: list[str] = Field(default_factory=list)
    optional: bool = False
    keep_directories: Literal["none", "suffix", "full"] = "none"
    filename: str | None = None
    download: Literal["always", "on-demand"] = "always"
