"""Assets of a project on a real DagsterInstance, with a backend that plays the platform."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey, DagsterEventType, DagsterInstance

from tests.support.dagster_face import (
    TWO_STEPS,
    FakeBackend,
    datum_of,
    event,
    final,
    project_of,
    view_of,
)
from valohai_dagster.executions.spec_model import ExecutionSpec
from valohai_dagster.executions.stream import EventKind, ExecutionStatus, FollowEvent
from valohai_dagster.plugin.assets import project_assets
from valohai_dagster.plugin.following import TOLD_OUTPUTS
from valohai_dagster.plugin.step_tag import STEP_TAG, read_step_tag

PREP = AssetKey(["digits", "Prepare_data"])
TRAIN = AssetKey(["digits", "train"])


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with dg.instance_for_test() as found:
        yield found


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def assets_of(
    backend: FakeBackend, text: str = TWO_STEPS, **options: Any
) -> list[dg.AssetsDefinition]:
    commit = options.pop("commit", "a" * 40)
    return project_assets(project_of(text, commit=commit), open_backend=lambda: backend, **options)


def run(
    assets: Any,
    instance: DagsterInstance,
    *,
    select: Any = None,
    config: Any = None,
    raises: bool = True,
) -> Any:
    run_config = {"ops": config} if config else None
    return dg.materialize(
        assets, instance=instance, selection=select, run_config=run_config, raise_on_error=raises
    )


def messages(instance: DagsterInstance, run_id: str) -> list[str]:
    records = instance.get_records_for_run(run_id).records
    return [record.event_log_entry.user_message or "" for record in records]


def events_of(instance: DagsterInstance, run_id: str, kind: DagsterEventType) -> list[Any]:
    records = instance.get_records_for_run(run_id, of_type=kind).records
    return [record.event_log_entry.dagster_event for record in records]


def test_both_steps_run_and_files_follow_the_pipelines_edge(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    result = run(assets_of(backend), instance)
    assert result.success
    prep, train = backend.submitted
    assert prep.step == "Prepare data"
    assert prep.commands == ["python prepare.py --rows=100"]
    assert train.inputs[0].uris == [backend.views[prep.execution_id].outputs[0].uri]
    assert prep.run_id == result.run_id
    assert prep.asset_key == list(PREP.path)
    assert prep.log_key is not None
    assert prep.log_key[:2] == [result.run_id, "compute_logs"]


def test_the_materialization_tells_what_ran(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    backend.metadata = {"accuracy": 0.9, "_time": "x", "note": "fine", "epoch": "3"}
    result = run(assets_of(backend), instance, select=[PREP])
    found = instance.get_latest_materialization_event(PREP)
    assert found is not None
    assert found.asset_materialization is not None
    metadata = found.asset_materialization.metadata
    assert metadata["commit"].value == "a" * 40
    assert metadata["image"].value == "python:3.11"
    assert metadata["environment"].value == "local"
    assert metadata["worker"].value == "w1 on host1"
    assert "python prepare.py --rows=100" in str(metadata["command"].value)
    assert metadata["metrics/accuracy"].value == 0.9
    assert metadata["metrics/epoch"].value == 3.0
    rows = [record.data for record in metadata["outputs"].records]  # type: ignore[attr-defined]
    assert rows[0]["name"] == "part.csv"
    assert rows[0]["uri"].startswith("datum://")
    assert metadata["seconds/queued"].value == 2.0
    assert any("leased by worker w1" in message for message in messages(instance, result.run_id))


def test_a_later_run_of_train_alone_uses_the_latest_preparation(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend)
    run(assets, instance, select=[PREP])
    run(assets, instance, select=[TRAIN])
    prep, train = backend.submitted
    assert train.inputs[0].uris == [backend.views[prep.execution_id].outputs[0].uri]


def test_train_without_any_preparation_says_what_is_missing(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    result = run(assets_of(backend), instance, select=[TRAIN], raises=False)
    failure = events_of(instance, result.run_id, DagsterEventType.STEP_FAILURE)[0].step_failure_data
    assert "Prepare data" in failure.user_failure_data.description
    assert not backend.submitted


def test_launch_values_reach_the_execution(instance: DagsterInstance, backend: FakeBackend) -> None:
    config = {
        "parameters": {"rows": 7},
        "image": "python:3.12",
        "environment": "gpu",
        "environment_variables": {"A": "1"},
        "tags": ["x"],
        "title": "seven",
    }
    run(
        assets_of(backend),
        instance,
        select=[PREP],
        config={"digits__Prepare_data": {"config": config}},
    )
    spec = backend.submitted[0]
    assert spec.parameters == {"rows": 7}
    assert (spec.image, spec.environment, spec.title, spec.tags) == (
        "python:3.12",
        "gpu",
        "seven",
        ["x"],
    )
    assert spec.environment_variables["A"] == "1"


def test_y34_a_value_out_of_bounds_fails_before_anything_is_submitted(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    config = {"digits__Prepare_data": {"config": {"parameters": {"rows": 5000}}}}
    result = run(assets_of(backend), instance, select=[PREP], config=config, raises=False)
    failure = events_of(instance, result.run_id, DagsterEventType.STEP_FAILURE)[0].step_failure_data
    assert (
        "5000 is greater than the maximum allowed (1000)" in failure.user_failure_data.description
    )
    assert not backend.submitted


def test_explicit_inputs_win_over_the_edge(instance: DagsterInstance, backend: FakeBackend) -> None:
    config = {"digits__train": {"config": {"inputs": {"data": ["https://example.com/d.csv"]}}}}
    run(assets_of(backend), instance, select=[TRAIN], config=config)
    assert backend.submitted[0].inputs[0].uris == ["https://example.com/d.csv"]


# -- staleness ----------------------------------------------------------------------------------------------------


def staleness(assets: list[dg.AssetsDefinition], instance: DagsterInstance) -> dict[str, str]:
    from dagster._core.definitions.data_version import CachingStaleStatusResolver
    from dagster._core.loader import LoadingContextForTest

    graph = dg.Definitions(assets=assets).resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    return {key.path[-1]: resolver.get_status(key).value for key in (PREP, TRAIN)}


def test_everything_is_fresh_after_a_run_and_stays_fresh_when_outputs_do_not_change(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend)
    run(assets, instance)
    assert staleness(assets, instance) == {"Prepare_data": "FRESH", "train": "FRESH"}
    run(assets, instance, select=[PREP])
    assert staleness(assets, instance) == {"Prepare_data": "FRESH", "train": "FRESH"}


def test_changed_outputs_make_downstream_stale(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    assets = assets_of(backend)
    run(assets, instance)
    backend.content = {"part.csv": b"other"}
    run(assets, instance, select=[PREP])
    assert staleness(assets, instance) == {"Prepare_data": "FRESH", "train": "STALE"}
    run(assets, instance, select=[TRAIN])
    assert staleness(assets, instance) == {"Prepare_data": "FRESH", "train": "FRESH"}


def test_a_new_commit_makes_assets_stale(instance: DagsterInstance, backend: FakeBackend) -> None:
    run(assets_of(backend), instance)
    changed = assets_of(backend, commit="b" * 40)
    assert staleness(changed, instance) == {"Prepare_data": "STALE", "train": "STALE"}
    run(changed, instance)
    assert staleness(changed, instance) == {"Prepare_data": "FRESH", "train": "FRESH"}


def two_metrics(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
    yield event(EventKind.metadata, latest={"loss": 0.5, "epoch": 1})
    yield event(EventKind.metadata, latest={"loss": 0.4, "epoch": 2})
    yield from backend.success(spec)


def test_an_observation_of_running_metrics_makes_nothing_stale(
    instance: DagsterInstance, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("valohai_dagster.plugin.following.OBSERVE_SECONDS", 0.0)
    backend.script = two_metrics
    assets = assets_of(backend)
    result = run(assets, instance)
    observations = events_of(instance, result.run_id, DagsterEventType.ASSET_OBSERVATION)
    first = observations[0].asset_observation_data.asset_observation
    assert len(observations) == 2  # the fake tells both at one moment, which is told once
    assert first.metadata["metrics/loss"].value == 0.5
    assert staleness(assets, instance) == {"Prepare_data": "FRESH", "train": "FRESH"}


def test_what_ends_within_a_minute_is_not_observed_before(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    backend.script = two_metrics
    result = run(assets_of(backend), instance)
    assert not events_of(instance, result.run_id, DagsterEventType.ASSET_OBSERVATION)


def test_many_outputs_are_told_by_name_first_and_then_by_number(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    """2,000 rows of the event log took ten seconds after the execution had ended."""
    outputs = [datum_of(f"o{n}.txt", b"x") for n in range(TOLD_OUTPUTS + 50)]

    def script(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        for datum in outputs:
            told = datum.model_dump(mode="json")
            yield event(EventKind.output, f"stored output {datum.name}", **told)
        yield final(view_of(spec, outputs=outputs))

    backend.script = script
    result = run(assets_of(backend), instance, select=[PREP])
    told = [text for text in messages(instance, result.run_id) if "stored" in text]
    assert len(told) == TOLD_OUTPUTS + 1
    assert told[0].endswith("stored output o0.txt")
    assert told[-1].endswith("stored 150 outputs, 150 B; the first 100 are named above")
    found = instance.get_latest_materialization_event(PREP)
    assert found is not None
    assert found.asset_materialization is not None
    assert found.asset_materialization.metadata["output_count"].value == len(outputs)


def test_outputs_that_are_not_named_are_counted_now_and_then(
    instance: DagsterInstance, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("valohai_dagster.plugin.following.TOLD_OUTPUTS", 1)
    monkeypatch.setattr("valohai_dagster.plugin.following.COUNT_SECONDS", 0.0)

    def script(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        for n in range(3):
            yield event(EventKind.output, f"stored output {n}", size=500)
        yield from backend.success(spec)

    backend.script = script
    result = run(assets_of(backend), instance, select=[PREP])
    told = [text for text in messages(instance, result.run_id) if "stored" in text]
    assert [text.partition(": ")[2] for text in told] == [
        "stored output 0",
        "stored 2 outputs so far, 1.0 kB",
        "stored 3 outputs so far, 1.5 kB",
        "stored 3 outputs, 1.5 kB; the first 1 are named above",
    ]


def test_an_answer_to_silence_that_says_nothing_new_is_not_told(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    """It read as if the execution had started again."""
    seconds = iter(range(100))

    def standing(message: str, status: str) -> FollowEvent:
        told = event(EventKind.snapshot, message, status=status)
        return told.model_copy(update={"time": told.time + timedelta(seconds=next(seconds))})

    def script(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        yield event(EventKind.state, "leased by worker w1", status="started")
        yield event(EventKind.state, "downloading from h", phase="downloading")
        for _ in range(3):
            yield standing("started", "started")
        yield event(EventKind.state, "downloading, f: no answer (try 1 of 3)", phase="downloading")
        for _ in range(2):
            yield standing("stopping: by hand", "stopping")
        yield final(view_of(spec))

    backend.script = script
    result = run(assets_of(backend), instance, select=[PREP])
    named = [text for text in messages(instance, result.run_id) if text.startswith("execution ")]
    assert [text.partition(": ")[2] for text in named][1:] == [
        "queued in group local",
        "leased by worker w1",
        "downloading from h",
        "downloading, f: no answer (try 1 of 3)",
        "stopping: by hand",
        "ended: complete",
    ]


def test_an_assets_kind_does_not_depend_on_the_workers_runtime(backend: FakeBackend) -> None:
    assert [spec.kinds for made in assets_of(backend) for spec in made.specs] == [
        {"valohai", "python"}
    ] * 2


def test_a_re_execution_uses_its_parent_runs_files_and_not_the_latest(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    def fail_training(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        if spec.step == "train":
            yield final(
                view_of(spec, status=ExecutionStatus.error, reason="exit code 3", exit_code=3)
            )
        else:
            yield from backend.success(spec)

    backend.script = fail_training
    assets = assets_of(backend)
    first = run(assets, instance, raises=False)
    assert not first.success
    backend.script = None
    backend.content = {"part.csv": b"other"}
    run(assets, instance, select=[PREP])
    job = dg.Definitions(assets=assets).resolve_implicit_global_asset_job_def()
    options = dg.ReexecutionOptions.from_failure(first.run_id, instance)
    result = job_reexecute(job, options, instance)
    assert result.success
    prep_of_first = backend.submitted[0]
    assert backend.submitted[-1].inputs[0].uris == [
        backend.views[prep_of_first.execution_id].outputs[0].uri
    ]
    assert staleness(assets, instance) == {"Prepare_data": "FRESH", "train": "STALE"}


def job_reexecute(job: Any, options: Any, instance: DagsterInstance) -> Any:
    """From failure without a reconstructable job: only the failed step, child of the first run."""
    return job.execute_in_process(
        instance=instance,
        asset_selection=[TRAIN],
        tags={
            "dagster/parent_run_id": options.parent_run_id,
            "dagster/root_run_id": options.parent_run_id,
        },
    )


# -- failures and stops ------------------------------------------------------------------------------------------


def test_a_failure_names_reason_exit_code_last_stderr_and_next_step(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    def script(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        yield final(
            view_of(spec, status=ExecutionStatus.error, reason="the command failed", exit_code=3)
        )

    backend.script, backend.stderr = script, ["Traceback", "ValueError: boom"]
    result = run(assets_of(backend), instance, select=[PREP], raises=False)
    failure = events_of(instance, result.run_id, DagsterEventType.STEP_FAILURE)[0].step_failure_data
    text = failure.user_failure_data.description
    assert "the command failed" in text
    assert "exit code 3" in text
    assert "ValueError: boom" in text
    assert "Next:" in text
    assert failure.user_failure_data.metadata["exit_code"].value == 3


def test_a_retry_policy_makes_a_second_execution(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    def script(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        if spec.retry_number == 0:
            yield final(view_of(spec, status=ExecutionStatus.error, reason="flaky"))
        else:
            yield from backend.success(spec)

    backend.script = script
    assets = assets_of(backend, retry_policy=dg.RetryPolicy(max_retries=1))
    assert run(assets, instance, select=[PREP]).success
    first, second = backend.submitted
    assert first.execution_id != second.execution_id
    assert (first.retry_number, second.retry_number) == (0, 1)


def test_terminating_the_run_stops_the_execution_and_every_hop_is_in_the_event_log(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    def script(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        yield event(EventKind.state, "running", status="started")
        if not backend.stops:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        deadline = time.monotonic() + 10
        while not backend.stops and time.monotonic() < deadline:
            time.sleep(0.02)
            yield None
        yield event(EventKind.state, "worker w1 sent SIGINT to the command", signal="SIGINT")
        yield final(view_of(spec, status=ExecutionStatus.stopped, reason="stopped on request"))

    backend.script = script
    with pytest.raises((dg.DagsterExecutionInterruptedError, KeyboardInterrupt)):
        run(assets_of(backend), instance, select=[PREP])
    execution = backend.submitted[0].execution_id
    assert backend.stops == [(execution, False)]
    run_id = instance.get_runs()[0].run_id
    hops = [e.message or "" for e in events_of(instance, run_id, DagsterEventType.ENGINE_EVENT)]
    wanted = [
        "interrupt reached",
        "Handed the stop over",
        "worker w1 sent SIGINT",
        "ended with status stopped",
    ]
    assert [any(part in hop for hop in hops) for part in wanted] == [True] * 4, hops


def test_somebody_elses_stop_fails_the_step_without_a_retry(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    def script(backend: FakeBackend, spec: ExecutionSpec) -> Iterator[FollowEvent | None]:
        yield final(view_of(spec, status=ExecutionStatus.stopped, reason="stopped by the CLI"))

    backend.script = script
    assets = assets_of(backend, retry_policy=dg.RetryPolicy(max_retries=3))
    assert not run(assets, instance, select=[PREP], raises=False).success
    assert len(backend.submitted) == 1


def test_the_op_tag_survives_in_the_job_snapshot(
    instance: DagsterInstance, backend: FakeBackend
) -> None:
    result = run(assets_of(backend), instance)
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None
    assert stored.job_snapshot_id is not None
    snapshot = instance.get_job_snapshot(stored.job_snapshot_id)
    tags = {op.name: op.tags[STEP_TAG] for op in snapshot.node_defs_snapshot.op_def_snaps}
    data = read_step_tag(tags["digits__train"])
    assert data.step.name == "train"
    assert data.parents == (tuple(PREP.path),)
    assert data.edges[0].source_key == "*.csv"
    assert json.loads(tags["digits__train"])["v"] == 1
