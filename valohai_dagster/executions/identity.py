"""Who a conductor is to the others."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One process. `home` begins the names of all conductors that ran in the same state directory, one at a time."""

    home: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.home + secrets.token_hex(8))

    @classmethod
    def of(cls, state_dir: Path) -> Identity:
        return cls(home=f"{os.uname().nodename}:{state_dir}:")
