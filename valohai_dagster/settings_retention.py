"""What is kept for how long, `[retention]`. Everything is off by default."""

from __future__ import annotations

from pydantic import Field

from valohai_dagster.settings_base import Section


class ProjectRetention(Section):
    """Days of one project, `[retention.projects.NAME]`; what is not set is as for all. 0 means for ever."""

    logs_days: float | None = Field(default=None, ge=0, description="Complete logs.")
    outputs_days: float | None = Field(default=None, ge=0, description="Contents of outputs.")
    metadata_days: float | None = Field(default=None, ge=0, description="Metadata lines.")
    code_days: float | None = Field(default=None, ge=0, description="Archives of commits.")


class RetentionSettings(Section):
    """What goes after how many days, counted from the end of an execution, `[retention]`.

    Nothing goes by default, and nothing goes by itself: run `valohai-dagster retention run`, or switch on the sensor `retention`.
    Records and lineage always stay.
    """

    logs_days: float | None = Field(
        default=None, gt=0, description="Complete logs of executions. Default: for ever."
    )
    outputs_days: float | None = Field(
        default=None,
        gt=0,
        description="Contents of outputs; the record says `purged`. Uploads and adopted files are never touched. "
        "Default: for ever.",
    )
    metadata_days: float | None = Field(
        default=None,
        gt=0,
        description="Metadata lines (metrics over time); the last values stay. Default: for ever.",
    )
    code_days: float | None = Field(
        default=None,
        gt=0,
        description="Archives of commits, counted from their last use; the newest of a project stays. "
        "Default: for ever.",
    )
    events_days: float | None = Field(
        default=None,
        gt=0,
        description="Rows of Dagster's event log that are no asset events, of finished runs: engine and step events, log "
        "lines. Materializations, observations, checks and starts and ends of runs stay. Default: for ever.",
    )
    keep_aliased: bool = Field(default=True, description="Keep outputs that an alias names.")
    keep_tagged: bool = Field(default=True, description="Keep outputs that carry any tag.")
    keep_in_datasets: bool = Field(
        default=True, description="Keep outputs that are in a dataset version."
    )
    keep_in_models: bool = Field(
        default=True, description="Keep outputs that are in a model version."
    )
    keep_used: bool = Field(
        default=True,
        description="Keep outputs that a kept execution has read: one that is not old enough, that carries a tag of "
        "`keep_tags`, or that has made something that is kept by its name.",
    )
    keep_tags: list[str] = Field(
        default_factory=list,
        description="Keep everything of executions that carry one of these tags.",
    )
    projects: dict[str, ProjectRetention] = Field(
        default_factory=dict, description="Other days for single projects, by their names."
    )
    batch: int = Field(
        default=1000,
        ge=1,
        description="Most things of each kind that one tick of the sensor removes.",
    )

    def days(self, kind: str, project: str | None) -> float | None:
        """Days of `logs`, `outputs`, `metadata` or `code` for a project; None for ever."""
        own = self.projects.get(project or "")
        found = getattr(own, f"{kind}_days") if own is not None else None
        if found is None:
            found = getattr(self, f"{kind}_days")
        return found or None

    def shortest(self, kind: str) -> float | None:
        """The least days of any project; None when the kind is kept for ever everywhere."""
        names = [None, *self.projects]
        return min((days for name in names if (days := self.days(kind, name))), default=None)
