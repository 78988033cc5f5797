"""Metadata and data versions of materializations."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from tests.support.dagster_face import NOON, datum_of, view_of
from valohai_agent.protocol import PhaseSpan
from valohai_dagster.executions.spec_model import CommitRef, ExecutionSpec, ProjectRef
from valohai_dagster.executions.stream import ExecutionView, InputView
from valohai_dagster.plugin.results import (
    MAX_PICTURE_BYTES,
    MAX_ROWS,
    data_version_of,
    failure_metadata,
    metadata_of,
    numeric_metrics,
)


def view(**changes: Any) -> ExecutionView:
    commit = CommitRef(identifier="c", archive_store="s", archive_key="k", archive_sha256="0")
    fields: dict[str, Any] = {
        "execution_id": "e1",
        "project": ProjectRef(name="digits"),
        "commit": commit,
        "step": "train",
        "image": "i",
        "commands": ["run ```x```"],
    }
    spec = ExecutionSpec(**fields)
    return view_of(spec, **changes)


def test_the_data_version_depends_on_names_and_contents_alone() -> None:
    a, b = datum_of("a", b"1", salt="x"), datum_of("b", b"2")
    first = data_version_of(view(outputs=[a, b]))
    assert first == data_version_of(view(id="other", outputs=[b, datum_of("a", b"1", salt="y")]))
    assert first != data_version_of(view(outputs=[a]))
    assert first != data_version_of(view(outputs=[a, datum_of("b", b"3")]))


def test_values_that_others_take_are_part_of_the_data_version() -> None:
    exported = {"metadata": ["best"], "parameter": ["n"]}
    one = view(latest_metadata={"best": 1, "loss": 1}, parameters={"n": 1, "m": 1})
    same = view(latest_metadata={"best": 1, "loss": 2}, parameters={"n": 1, "m": 2})
    other = view(latest_metadata={"best": 2, "loss": 1}, parameters={"n": 1})
    versions = [data_version_of(v, exported=exported) for v in (one, same, other)]
    assert versions[0] == versions[1] != versions[2]


def test_m15_numbers_and_numeric_texts_chart_and_nothing_else_does() -> None:
    values = {
        "a": 1,
        "b": "2.5",
        "c": "x",
        "d": True,
        "e": float("nan"),
        "f": [1],
        "_time": 5,
        "g": "inf",
    }
    assert numeric_metrics(values) == {"a": 1.0, "b": 2.5}


def test_small_pictures_are_inline_with_a_durable_link() -> None:
    picture = datum_of("plots/matrix (1).png", b"\x89PNG")
    big = datum_of("big.png", b"x").model_copy(update={"size": MAX_PICTURE_BYTES + 1})
    metadata = metadata_of(view(outputs=[picture, big]), read_small=lambda datum: b"\x89PNG")
    text = str(metadata["picture/plots/matrix (1).png"].value)
    assert text.startswith("![plots/matrix _1_.png](data:image/png;base64,iVBORw==)")
    assert str(picture.url) in text
    assert "picture/big.png" not in metadata
    assert metadata["file/big.png"].value == big.url


def test_a_picture_that_would_make_the_markdown_too_long_to_be_shown_is_linked() -> None:
    """The UI hides markdown of 1,000 characters and more behind a click."""
    picture = datum_of("matrix.png", b"x" * 900)
    metadata = metadata_of(view(outputs=[picture]), read_small=lambda datum: b"x" * 900)
    text = str(metadata["picture/matrix.png"].value)
    assert text == f"[![matrix.png]({picture.url})]({picture.url})"


def test_an_unreadable_picture_is_linked() -> None:
    metadata = metadata_of(view(outputs=[datum_of("a.png", b"x")]), read_small=lambda datum: None)
    assert "data:" not in str(metadata["picture/a.png"].value)


def test_phases_and_waiting_are_seconds() -> None:
    spans = [
        PhaseSpan(phase="running", started_at=NOON, ended_at=NOON + timedelta(seconds=1.5)),
        PhaseSpan(phase="uploading", started_at=NOON, ended_at=NOON + timedelta(seconds=1)),
    ]
    metadata = metadata_of(view(phases=spans))
    assert metadata["seconds/running"].value == 1.5
    assert metadata["seconds/uploading"].value == 1.0
    assert metadata["seconds/queued"].value == 2.0


def test_tables_are_cut_and_the_count_is_told() -> None:
    outputs = [datum_of(f"{n}.txt", b"x") for n in range(MAX_ROWS + 5)]
    metadata = metadata_of(view(outputs=outputs))
    assert len(metadata["outputs"].records) == MAX_ROWS  # type: ignore[attr-defined]
    assert metadata["output_count"].value == MAX_ROWS + 5
    shown = str(metadata["outputs_shown"].value)
    assert (
        shown == f"the first {MAX_ROWS} of {MAX_ROWS + 5}; `valohai-dagster outputs e1` lists all"
    )
    assert failure_metadata(view(outputs=outputs))["outputs_shown"].value == shown
    assert "outputs_shown" not in metadata_of(view(outputs=outputs[:MAX_ROWS]))


def test_inputs_are_counted_with_their_cache_hits() -> None:
    inputs = [
        InputView(input="a", name=f"{n}", uri="s3://b/k", size=2, cached=n % 2 == 0)
        for n in range(MAX_ROWS + 1)
    ]
    metadata = metadata_of(view(inputs=inputs))
    assert metadata["input_count"].value == MAX_ROWS + 1
    assert metadata["input_bytes"].value == 2 * (MAX_ROWS + 1)
    assert metadata["inputs_from_cache"].value == MAX_ROWS // 2 + 1
    assert "of 201" in str(metadata["inputs_shown"].value)
    unknown = [one.model_copy(update={"cached": None}) for one in inputs[:3]]
    metadata = metadata_of(view(inputs=unknown))
    assert "inputs_from_cache" not in metadata
    assert "inputs_shown" not in metadata


def test_a_command_with_fences_stays_one_code_block() -> None:
    text = str(metadata_of(view())["command"].value)
    assert text.startswith("````\n")
    assert text.endswith("\n````")


def test_a_failure_keeps_metrics_and_outputs() -> None:
    metadata = failure_metadata(
        view(exit_code=3, latest_metadata={"loss": 1.0}, outputs=[datum_of("a", b"1")])
    )
    assert metadata["exit_code"].value == 3
    assert metadata["metrics/loss"].value == 1.0
    assert "outputs" in metadata


def test_m08_measured_resources_are_shown_and_others_left_out() -> None:
    metadata = metadata_of(
        view(cpu_cores_average=1.5, cpu_cores_peak=2.0, max_memory_bytes=10, cpu_seconds=3.0)
    )
    assert metadata["cpu_cores_average"].value == 1.5
    assert metadata["cpu_cores_peak"].value == 2.0
    assert metadata["max_memory_bytes"].value == 10
    assert "gpu_utilization_peak" not in metadata
