"""A project from YAML text, and a backend that plays the platform for the Dagster face."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from valohai_yaml import parse

from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec
from valohai_dagster.executions.stream import (
    DatumView,
    EventKind,
    ExecutionStatus,
    ExecutionView,
    FollowEvent,
    InputView,
)
from valohai_dagster.executions.views import Origin
from valohai_dagster.plugin.log_sections import Chunk
from valohai_dagster.projects.edges import derive_edges
from valohai_dagster.projects.names import legal_name, legal_names
from valohai_dagster.projects.project import Commit, Project, ProjectSource
from valohai_dagster.projects.source import Tree
from valohai_dagster.projects.step import StepDefinition

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
SHA = "0123456789abcdef0123456789abcdef01234567"

TWO_STEPS = """
- step:
    name: Prepare data
    image: python:3.11
    command: python prepare.py {parameters}
    parameters:
      - {name: rows, type: integer, default: 100, min: 1, max: 1000}
- step:
    name: train
    image: python:3.11
    command: python train.py {parameters}
    inputs:
      - name: data
    parameters:
      - {name: learning-rate, type: float, default: 0.1}
- pipeline:
    name: all
    nodes:
      - {name: prep, type: execution, step: Prepare data}
      - {name: train, type: execution, step: train}
    edges:
      - [prep.output.*.csv, train.input.data]
"""


def project_of(
    text: str, *, name: str = "digits", commit: str = SHA, root: Path = Path("/src/digits")
) -> Project:
    """A project without files: only what the asset graph reads."""
    config = parse(textwrap.dedent(text))
    names = legal_names(config.steps)
    steps = {
        key: StepDefinition(project=name, step=step, asset_name=names[key])
        for key, step in config.steps.items()
    }
    edges, problems = derive_edges(config.steps, config.pipelines)
    return Project(
        name=name,
        root=root,
        source=ProjectSource(location=str(root), is_git_url=False, name=name),
        commit=Commit(identifier=commit, ref="main"),
        asset_name=legal_name(name, fallback="project"),
        steps=steps,
        edges=edges,
        pipelines=config.pipelines,
        problems=problems,
        tree=Tree(root=root, commit=Commit(identifier=commit, ref="main")),
    )


def datum_of(name: str, content: bytes, *, salt: str = "") -> DatumView:
    digest = hashlib.sha256(content).hexdigest()
    ident = f"{hashlib.md5((salt + name).encode()).hexdigest()[:8]}-0000-4000-8000-000000000000"
    return DatumView(
        id=ident,
        name=name,
        size=len(content),
        sha256=digest,
        uri=f"datum://{ident}",
        url=f"http://127.0.0.1:3080/datum/{ident}",
    )


def view_of(spec: ExecutionSpec, **changes: Any) -> ExecutionView:
    """The completed execution of a spec."""
    values: dict[str, Any] = {
        "id": spec.execution_id,
        "counter": 1,
        "project": spec.project.name,
        "project_id": "p1",
        "step": spec.step,
        "commit": spec.commit.identifier,
        "image": spec.image,
        "status": ExecutionStatus.complete,
        "exit_code": 0,
        "environment": spec.environment or "local",
        "worker": "w1",
        "host": "host1",
        "runtime": "process",
        "command": "\n".join(spec.commands),
        "parameters": spec.parameters,
        "inputs": [
            InputView(
                input=i.name,
                name=f"{n}.csv",
                uri=uri,
                size=1,
                datum_id=uri.removeprefix("datum://") or None,
            )
            for i in spec.inputs
            for n, uri in enumerate(i.uris)
        ],
        "ctime": NOON,
        "qtime": NOON,
        "started_at": NOON + timedelta(seconds=2),
        "ended_at": NOON + timedelta(seconds=5),
    }
    return ExecutionView(**{**values, **changes})


Script = Callable[["FakeBackend", ExecutionSpec], Iterator["FollowEvent | None"]]


def event(kind: EventKind, message: str = "", **data: Any) -> FollowEvent:
    return FollowEvent(kind=kind, time=NOON, message=message, data=data)


def final(view: ExecutionView) -> FollowEvent:
    return event(EventKind.final, f"ended: {view.status.value}", **view.model_dump(mode="json"))


@dataclass
class FakeBackend:
    """Keeps what it was asked; `script` makes the events of one execution, by default success with one CSV."""

    content: dict[str, bytes] = field(default_factory=lambda: {"part.csv": b"a,b\n"})
    metadata: dict[str, Any] = field(default_factory=dict)
    script: Script | None = None
    submitted: list[ExecutionSpec] = field(default_factory=list)
    stops: list[tuple[str, bool]] = field(default_factory=list)
    views: dict[str, ExecutionView] = field(default_factory=dict)
    stderr: list[str] = field(default_factory=list)

    def submit(self, spec: ExecutionSpec) -> None:
        self.submitted.append(spec)

    def rejoinable(self, spec: ExecutionSpec, parent_run_ids: Sequence[str]) -> str | None:
        return None

    def follow(self, execution_id: str) -> Iterator[FollowEvent | None]:
        spec = next(s for s in self.submitted if s.execution_id == execution_id)
        yield event(EventKind.snapshot, "queued in group local", status="queued")
        yield None
        for item in self.script(self, spec) if self.script else self.success(spec):
            if item is not None and item.kind is EventKind.final:
                self.views[execution_id] = ExecutionView.model_validate(item.data)
            yield item

    def success(self, spec: ExecutionSpec, **changes: Any) -> Iterator[FollowEvent | None]:
        yield event(EventKind.state, "leased by worker w1", status="started")
        outputs = [
            datum_of(name, content, salt=spec.execution_id)
            for name, content in self.content.items()
        ]
        view = view_of(spec, **{"outputs": outputs, "latest_metadata": self.metadata, **changes})
        yield final(view)

    def stop(self, execution_id: str, *, hard: bool = False, reason: str = "") -> None:
        self.stops.append((execution_id, hard))

    def view(self, execution_id: str) -> ExecutionView | None:
        return self.views.get(execution_id)

    def origins(self, datum_ids: Collection[str]) -> Mapping[str, Origin]:
        made = {datum.id: view for view in self.views.values() for datum in view.outputs}
        specs = {spec.execution_id: spec for spec in self.submitted}
        return {
            ident: Origin(
                execution_id=made[ident].id,
                run_id=specs[made[ident].id].run_id,
                asset_key="/".join(specs[made[ident].id].asset_key or []),
            )
            for ident in datum_ids
            if ident in made
        }

    def publish(self, project: Project) -> tuple[CommitRef, tuple[str, ...]]:
        commit = CommitRef(
            identifier=project.commit.identifier,
            ref=project.commit.ref,
            adhoc=project.commit.adhoc,
            archive_store="local",
            archive_key="commits/x.tar.gz",
            archive_sha256="0" * 64,
        )
        return commit, ()

    def read_small(self, datum: DatumView) -> bytes | None:
        return self.content.get(datum.name)

    def log_after(self, execution_id: str, cursor: str | None) -> Chunk | None:
        return None

    def last_stderr(self, execution_id: str, lines: int) -> list[str]:
        return self.stderr[-lines:]
