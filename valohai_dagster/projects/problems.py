"""One finding about a project, with the place in the file and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`error` stops the project from loading, `warning` deserves a look, `note` explains a decision of ours."""

    level: Level
    message: str
    line: int | None = None  # 1-based, in the project's YAML file
    hint: str | None = None
    steps: tuple[str, ...] = ()  # names of the steps it concerns; none = the project as a whole
    path: tuple[str | int, ...] = field(default=(), compare=False)  # in the file's data

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        hint = f" (hint: {self.hint})" if self.hint else ""
        return f"{place}{self.message}{hint}"

    def concerns(self, step: str) -> bool:
        """Whether those who look at that step should see it: its own problems and those of the whole project."""
        return not self.steps or step in self.steps


def errors_of(problems: Iterable[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.level == "error"]
