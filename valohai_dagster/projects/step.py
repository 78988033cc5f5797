"""A step as the rest of the package sees it: the library's `Step`, plus what it cannot do here.

It travels as JSON in an op tag, so that an execution can be built without the user's code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from valohai_yaml.objs import Step

STEP_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StepDefinition:
    """One step of one commit.

    `unsupported` lists, in words, the keys of the file that concern the step and have no effect in this deployment;
    `notes` what else the check of the file has to say about it. Both are shown in the asset's description and in the
    log of each execution, so that nothing is ignored silently.
    """

    project: str
    step: Step = field(compare=False)
    asset_name: str = ""  # legal Dagster name, told apart from the project's other steps
    line: int | None = None  # of its `step:` item in the YAML file
    unsupported: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As written in the YAML, also the name that executions carry."""
        return self.step.name

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` restores; JSON-safe (dates of YAML become text)."""
        data = {
            "v": STEP_VERSION,
            "project": self.project,
            "asset_name": self.asset_name,
            "line": self.line,
            "unsupported": list(self.unsupported),
            "notes": list(self.notes),
            "step": self.step.serialize(),
        }
        return json.loads(json.dumps(data, default=str))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepDefinition:
        """Raise ValueError for a newer version: then the reader is older than the code location."""
        if data.get("v") != STEP_VERSION:
            raise ValueError(
                f"step definition has version {data.get('v')!r}, this side reads {STEP_VERSION}"
            )
        from valohai_yaml.objs import Step

        return cls(
            project=data["project"],
            asset_name=data["asset_name"],
            line=data.get("line"),
            unsupported=tuple(data.get("unsupported") or ()),
            notes=tuple(data.get("notes") or ()),
            step=Step.parse(data["step"]),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> StepDefinition:
        return cls.from_dict(json.loads(text))
