"""What an execution leaves in Dagster: metadata, data version and tags of its materialization.

Pure: everything comes from the execution's view. Addresses are durable ones of the execution service, never
signed or expiring URLs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster import MetadataValue, TableColumn, TableRecord, TableSchema

from valohai_dagster.executions.stream import DatumView, ExecutionView

MAX_ROWS = 200  # of a table in metadata; the whole list is in the records
MAX_LINKS = 20  # output files with a link of their own
MAX_PICTURES = 4
MAX_PICTURE_BYTES = 8 * 1024 * 1024  # the browser fetches it from the service
SHOWN_MARKDOWN = 1_000  # from this many characters on the UI hides markdown behind "Show Markdown"
MAX_METRICS = 200
MAX_TEXT = 2_000  # characters of one table cell or text
EXECUTION_ID_KEY = "valohai/execution_id"
PICTURE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}

ReadSmall = Callable[[DatumView], "bytes | None"]


def materialize_result(
    view: ExecutionView,
    *,
    exported: Mapping[str, Sequence[str]] | None = None,
    read_small: ReadSmall | None = None,
) -> dg.MaterializeResult[Any]:
    """The result of a completed execution.

    `exported` names the metadata keys (`metadata`) and parameters (`parameter`) that downstream assets take, since
    they are part of what this asset hands on. `read_small` gives the content of a small picture, None if unreadable.
    """
    return dg.MaterializeResult(
        metadata=metadata_of(view, read_small=read_small),
        data_version=dg.DataVersion(data_version_of(view, exported=exported)),
        tags={"valohai/execution": view.id},
    )


def data_version_of(
    view: ExecutionView, *, exported: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Digest of what downstream assets can get: names and contents of the outputs, and exported values.

    Ids, times and places are left out, so doing the same work again with the same result makes nothing stale.
    """
    exported = exported or {}
    parts: list[Any] = [
        sorted([d.name, d.sha256 or d.md5 or f"{d.id}:{d.size}"] for d in view.outputs)
    ]
    for kind, source in (("metadata", view.latest_metadata), ("parameter", view.parameters)):
        names = sorted(set(exported.get(kind, ())) & set(source))
        if names:
            parts.append([kind, {name: source[name] for name in names}])
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def metadata_of(
    view: ExecutionView, *, read_small: ReadSmall | None = None
) -> dict[str, MetadataValue[Any]]:
    """All metadata of the materialization; the order is the order in the UI."""
    return {
        **_facts(view),
        **_metrics(view.latest_metadata),
        **_pictures(view.outputs, read_small),
        **_tables(view),
        **_links(view.outputs),
        **_durations(view),
    }


def _facts(view: ExecutionView) -> dict[str, MetadataValue[Any]]:
    facts = {
        "execution": f"#{view.counter}",
        "project": view.project,
        "step": view.step,
        "commit": view.commit,
        "image": view.image,
        "environment": view.environment,
        "worker": " on ".join(part for part in (view.worker, view.host) if part) or None,
        "runtime": view.runtime,
        EXECUTION_ID_KEY: view.id,
    }
    out: dict[str, MetadataValue[Any]] = {
        k: MetadataValue.text(str(v)) for k, v in facts.items() if v
    }
    if view.command:
        out["command"] = MetadataValue.md(_code_block(view.command))
    if view.attempt > 1:
        out["attempt"] = MetadataValue.int(view.attempt)
    if view.restarts:
        out["restarts"] = MetadataValue.int(view.restarts)
    if view.warnings:
        out["warnings"] = MetadataValue.md("\n".join(f"- {warning}" for warning in view.warnings))
    return out


def _code_block(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def _metrics(latest: Mapping[str, Any]) -> dict[str, MetadataValue[Any]]:
    numbers = numeric_metrics(latest)
    out: dict[str, MetadataValue[Any]] = {
        f"metrics/{name}": MetadataValue.float(value)
        for name, value in list(numbers.items())[:MAX_METRICS]
    }
    others = {k: v for k, v in latest.items() if k not in numbers and not k.startswith("_")}
    for name, value in list(others.items())[:MAX_METRICS]:
        out[f"metrics/{name}"] = MetadataValue.text(_cell(value))
    return out


def numeric_metrics(latest: Mapping[str, Any]) -> dict[str, float]:
    """Values that a chart can show: finite numbers, and texts that parse as such (M-15)."""
    out: dict[str, float] = {}
    for name, value in latest.items():
        if (
            isinstance(value, bool)
            or name.startswith("_")
            or not isinstance(value, (int, float, str))
        ):
            continue
        try:
            number = float(value)
        except (ValueError, OverflowError):
            continue
        if math.isfinite(number):
            out[name] = number
    return out


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


def _table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> MetadataValue[Any]:
    records = [TableRecord({k: v for k, v in row.items() if v is not None}) for row in rows]
    schema = TableSchema(columns=[TableColumn(name, type=kind) for name, kind in columns.items()])
    return MetadataValue.table(records=records[:MAX_ROWS], schema=schema)


def _tables(view: ExecutionView) -> dict[str, MetadataValue[Any]]:
    out: dict[str, MetadataValue[Any]] = {}
    if view.parameters:
        rows = [{"name": name, "value": _cell(value)} for name, value in view.parameters.items()]
        out["parameters"] = _table({"name": "string", "value": "string"}, rows)
    if view.inputs:
        cached = [i.cached for i in view.inputs if i.cached is not None]
        out["inputs"] = _input_table(view)
        out |= _cut("inputs", view.inputs, "the records have all")
        out["input_count"] = MetadataValue.int(len(view.inputs))
        out["input_bytes"] = MetadataValue.int(sum(i.size or 0 for i in view.inputs))
        if cached:
            out["inputs_from_cache"] = MetadataValue.int(sum(cached))
    return {**out, **_output_tables(view)}


def _output_tables(view: ExecutionView) -> dict[str, MetadataValue[Any]]:
    return {
        "outputs": _output_table(view.outputs),
        **_cut("outputs", view.outputs, f"`valohai-dagster outputs {view.id}` lists all"),
        "output_count": MetadataValue.int(len(view.outputs)),
        "output_bytes": MetadataValue.int(sum(d.size for d in view.outputs)),
    }


def _cut(table: str, rows: Sequence[Any], where: str) -> dict[str, MetadataValue[Any]]:
    """Says so where a table does not hold all."""
    if len(rows) <= MAX_ROWS:
        return {}
    text = f"the first {MAX_ROWS:,} of {len(rows):,}; {where}"
    return {f"{table}_shown": MetadataValue.md(text)}


def _input_table(view: ExecutionView) -> MetadataValue[Any]:
    columns = {
        "input": "string",
        "name": "string",
        "size": "int",
        "sha256": "string",
        "uri": "string",
    }
    rows = [
        {
            "input": i.input,
            "name": _cell(i.name),
            "size": i.size,
            "sha256": i.sha256,
            "uri": _cell(i.uri),
        }
        for i in view.inputs
    ]
    return _table(columns, rows)


def _output_table(outputs: Sequence[DatumView]) -> MetadataValue[Any]:
    columns = {"name": "string", "size": "int", "sha256": "string", "uri": "string"}
    rows = [
        {"name": _cell(d.name), "size": d.size, "sha256": d.sha256, "uri": d.uri} for d in outputs
    ]
    return _table(columns, rows)


def _links(outputs: Sequence[DatumView]) -> dict[str, MetadataValue[Any]]:
    """The files, and where they come from and go to (A-52)."""
    files = {f"file/{d.name}": MetadataValue.url(d.url) for d in outputs[:MAX_LINKS] if d.url}
    first = next((d.url for d in outputs if d.url), None)
    trace: dict[str, MetadataValue[Any]] = {}
    if first is not None:
        trace["trace"] = MetadataValue.url(f"{first}/trace")
    return {**trace, **files}


def _pictures(
    outputs: Sequence[DatumView], read_small: ReadSmall | None
) -> dict[str, MetadataValue[Any]]:
    out: dict[str, MetadataValue[Any]] = {}
    for datum in outputs:
        if len(out) == MAX_PICTURES:
            break
        kind = picture_type(datum.name)
        if kind is None or not 0 < datum.size <= MAX_PICTURE_BYTES:
            continue
        text = _embedded(datum, kind, read_small) or _linked(datum)
        if text:
            out[f"picture/{datum.name}"] = MetadataValue.md(text)
    return out


def picture_type(name: str) -> str | None:
    return next(
        (kind for ending, kind in PICTURE_TYPES.items() if name.lower().endswith(ending)), None
    )


def _embedded(datum: DatumView, kind: str, read_small: ReadSmall | None) -> str | None:
    """A tiny picture as part of the text, so that it shows even when the service is not running."""
    if read_small is None or datum.size >= SHOWN_MARKDOWN:
        return None
    content = read_small(datum)
    if not content:
        return None
    label = _label(datum)
    text = f"![{label}](data:{kind};base64,{base64.b64encode(content).decode()})"
    text += f"\n\n[{label}]({datum.url})" if datum.url else ""
    return text if len(text) < SHOWN_MARKDOWN else None


def _linked(datum: DatumView) -> str | None:
    """The picture at its durable address; the UI's content security policy lets other origins' images pass."""
    if not datum.url:
        return None
    text = f"[![{_label(datum)}]({datum.url})]({datum.url})"
    return text if len(text) < SHOWN_MARKDOWN else None


def _label(datum: DatumView) -> str:
    return "".join(c if c.isalnum() or c in " ._-/" else "_" for c in datum.name)


def _durations(view: ExecutionView) -> dict[str, MetadataValue[Any]]:
    """Seconds per phase; only `running` counts towards limits. And what they cost (L-40)."""
    seconds: dict[str, float] = {}
    if view.qtime and view.started_at:
        seconds["queued"] = (view.started_at - view.qtime).total_seconds()
    for span in view.phases:
        seconds[span.phase] = (
            seconds.get(span.phase, 0.0) + (span.ended_at - span.started_at).total_seconds()
        )
    out: dict[str, MetadataValue[Any]] = {
        f"seconds/{phase}": MetadataValue.float(round(max(0.0, value), 3))
        for phase, value in seconds.items()
    }
    if view.price is not None:
        out["price"] = MetadataValue.float(float(view.price))
    return {**out, **_usage(view)}


def _usage(view: ExecutionView) -> dict[str, MetadataValue[Any]]:
    """M-08: resources as the agent measured them; what it could not measure is left out."""
    bytes_ = {
        "max_memory_bytes": view.max_memory_bytes,
        "gpu_memory_bytes_peak": view.gpu_memory_bytes_peak,
    }
    numbers = {
        "cpu_seconds": view.cpu_seconds,
        "cpu_cores_average": view.cpu_cores_average,
        "cpu_cores_peak": view.cpu_cores_peak,
        "gpu_utilization_peak": view.gpu_utilization_peak,
    }
    return {
        **{k: MetadataValue.int(v) for k, v in bytes_.items() if v is not None},
        **{k: MetadataValue.float(v) for k, v in numbers.items() if v is not None},
    }


def failure_metadata(view: ExecutionView) -> dict[str, MetadataValue[Any]]:
    """What a failed execution shows: facts, metrics so far and outputs, which are kept (O-01)."""
    out = {**_facts(view), **_metrics(view.latest_metadata), **_durations(view)}
    if view.exit_code is not None:
        out["exit_code"] = MetadataValue.int(view.exit_code)
    return {**out, **_output_tables(view)} if view.outputs else out
