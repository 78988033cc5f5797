"""The op tag `valohai/step`: a step in a job's snapshot, readable without user code.

It marks the ops that are ours, and carries what a driver needs that snapshots leave out (DAGSTER_NOTES 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from valohai_dagster.plugin.checks import MetricCheck
from valohai_dagster.plugin.versions import code_version_of
from valohai_dagster.projects.step import StepDefinition

if TYPE_CHECKING:
    import dagster as dg

    from valohai_dagster.projects.edges import StepEdge
    from valohai_dagster.projects.project import Project
    from valohai_dagster.projects.source import Commit

STEP_TAG = "valohai/step"
ENGINE_TAG = "valohai/engine"  # on a job: which engine runs it
DAGSTER_ENGINE = "dagster"  # its value for jobs that only Dagster's own engine can run
TAG_VERSION = 1
KeyPath = tuple[str, ...]  # of an asset key


@dataclass(frozen=True, kw_only=True)
class RetrySpec:
    """A retry policy as data; `backoff` and `jitter` are the names of Dagster's enum members."""

    max_retries: int
    delay: float | None = None
    backoff: str | None = None
    jitter: str | None = None

    @classmethod
    def of(cls, policy: dg.RetryPolicy) -> RetrySpec:
        return cls(
            max_retries=policy.max_retries,
            delay=policy.delay,
            backoff=policy.backoff.value if policy.backoff else None,
            jitter=policy.jitter.value if policy.jitter else None,
        )

    def policy(self) -> dg.RetryPolicy:
        import dagster as dg

        return dg.RetryPolicy(
            max_retries=self.max_retries,
            delay=self.delay,
            backoff=dg.Backoff(self.backoff) if self.backoff else None,
            jitter=dg.Jitter(self.jitter) if self.jitter else None,
        )


@dataclass(frozen=True, kw_only=True)
class TaggedSource:
    """An external source that feeds an input of the step, see `data.external`."""

    key: KeyPath
    input: str
    asked: str  # the URI that the records name beside each file found by it
    is_pattern: bool = False


@dataclass(frozen=True, kw_only=True)
class StepTag:
    """One step of one commit, its place in the asset graph, and what Dagster keeps of it in user code only."""

    step: StepDefinition
    project_name: str
    source: str  # absolute directory, or Git URL without credentials
    yaml_path: str
    commit: Commit
    asset_key: KeyPath
    output: str = "result"
    parents: tuple[KeyPath, ...] = ()
    edges: tuple[StepEdge, ...] = ()  # into this step
    upstream: Mapping[str, KeyPath] = field(default_factory=dict)  # source step -> its asset
    exported: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # see results.materialize_result
    code_version: str = ""
    retry: RetrySpec | None = None
    checks: tuple[MetricCheck, ...] = ()
    partition_parameter: str | None = None
    sources: tuple[TaggedSource, ...] = ()
    upload_store: str | None = None  # the project's default (O-15)

    def to_text(self) -> str:
        data = {
            "v": TAG_VERSION,
            "step": self.step.to_dict(),
            "project": {
                "name": self.project_name,
                "source": self.source,
                "yaml": self.yaml_path,
            },
            "commit": asdict(self.commit),
            "asset_key": self.asset_key,
            "output": self.output,
            "parents": self.parents,
            "edges": [asdict(edge) for edge in self.edges],
            "upstream": self.upstream,
            "exported": {kind: list(names) for kind, names in self.exported.items()},
            "code_version": self.code_version,
            "retry": asdict(self.retry) if self.retry else None,
            "checks": [check.to_dict() for check in self.checks],
            "partition_parameter": self.partition_parameter,
            "sources": [asdict(source) for source in self.sources],
            "upload_store": self.upload_store,
        }
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False, default=str)


def step_tag(
    project: Project,
    step: StepDefinition,
    *,
    code_version: str,
    retry: dg.RetryPolicy | None = None,
    checks: Sequence[MetricCheck] = (),
    partition_parameter: str | None = None,
    sources: Sequence[TaggedSource] = (),
    upload_store: str | None = None,
) -> StepTag:
    """The tag of one step of a loaded project. It holds no credentials."""
    edges = edges_into(project, step.name)
    upstream = {
        edge.source_step: asset_path_of(project, edge.source_step)
        for edge in edges
        if edge.source_step in project.steps
    }
    return StepTag(
        step=step,
        project_name=project.name,
        source=project.source.location,
        yaml_path=project.source.yaml_path,
        commit=project.commit,
        asset_key=asset_path_of(project, step.name),
        parents=_parents(upstream, sources),
        edges=tuple(edges),
        upstream=upstream,
        exported=exported_values(project, step.name),
        code_version=code_version,
        retry=RetrySpec.of(retry) if retry else None,
        checks=tuple(checks),
        partition_parameter=partition_parameter,
        sources=tuple(sources),
        upload_store=upload_store,
    )


def _parents(
    upstream: Mapping[str, KeyPath], sources: Sequence[TaggedSource]
) -> tuple[KeyPath, ...]:
    return (*upstream.values(), *dict.fromkeys(source.key for source in sources))


@lru_cache(maxsize=4_096)
def read_step_tag(text: str) -> StepTag:
    """Raises ValueError for a version that this side does not know; keys that an older side left out are empty."""
    from valohai_dagster.projects.edges import StepEdge
    from valohai_dagster.projects.source import Commit

    data: dict[str, Any] = json.loads(text)
    if data.get("v") != TAG_VERSION:
        raise ValueError(
            f"the tag {STEP_TAG} has version {data.get('v')!r}, this side reads {TAG_VERSION}"
        )
    edges = tuple(StepEdge(**edge) for edge in data["edges"])
    parents = tuple(tuple(parent) for parent in data["parents"])
    upstream = data.get("upstream")
    if upstream is None:  # parents were written in the order in which edges first name them
        upstream = dict(zip(dict.fromkeys(edge.source_step for edge in edges), parents))  # noqa: B905
    return StepTag(
        step=StepDefinition.from_dict(data["step"]),
        project_name=data["project"]["name"],
        source=data["project"]["source"],
        yaml_path=data["project"]["yaml"],
        commit=Commit(**data["commit"]),
        asset_key=tuple(data["asset_key"]),
        output=data["output"],
        parents=parents,
        edges=edges,
        upstream={name: tuple(path) for name, path in upstream.items()},
        exported=data.get("exported") or {},
        code_version=data["code_version"],
        retry=RetrySpec(**data["retry"]) if data.get("retry") else None,
        checks=tuple(MetricCheck.from_dict(check) for check in data.get("checks") or ()),
        partition_parameter=data.get("partition_parameter"),
        sources=tuple(
            TaggedSource(**{**source, "key": tuple(source["key"])})
            for source in data.get("sources") or ()
        ),
        upload_store=data.get("upload_store"),
    )


def tag_at(tag: StepTag, project: Project) -> StepTag:
    """The same step of another commit; what belongs to the loaded asset graph stays: key, checks, sources and so on."""
    step = project.step(tag.step.name)
    fresh = step_tag(project, step, code_version=code_version_of(step, project.commit.identifier))
    return replace(
        fresh,
        asset_key=tag.asset_key,
        exported=tag.exported,
        retry=tag.retry,
        checks=tag.checks,
        partition_parameter=tag.partition_parameter,
        sources=tag.sources,
        upload_store=tag.upload_store,
        parents=_parents(fresh.upstream, tag.sources),
    )


def edges_into(project: Project, step: str) -> list[StepEdge]:
    return [edge for edge in project.edges if edge.target_step == step]


def asset_path_of(project: Project, step: str) -> KeyPath:
    return (project.asset_name, project.steps[step].asset_name)


def exported_values(project: Project, step: str) -> dict[str, list[str]]:
    """Metadata keys and parameters of the step that other steps take through edges."""
    out: dict[str, list[str]] = {}
    for edge in project.edges:
        if edge.source_step == step and edge.source_type in ("metadata", "parameter"):
            out.setdefault(edge.source_type, []).append(edge.source_key)
    return out
